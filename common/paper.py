"""
What the two papers report, as far as this project quotes it: each number of theirs stands here, and
nowhere else. They are quoted as the papers', never as ours.
"""

# Kirchenbauer et al., arXiv 2602.06019: Llama-3.1-8B-Magpie on GSM8K
MODEL_PARAMETERS = 8e9                  # of the model of all their numbers below
TRAINING = {"steps": 100_000, "k_max": 16, "lr": 1e-5, "model_parameters": (4e9, 8e9)}
GSM8K = {"shots": 8, "questions": 1319}
# Decoding: (accuracy in % by flexible-extract, tokens per forward)
DECODING = {
    "start, k = 1": (69.5, 1),
    "k = 1": (66.0, 1),
    "static 2": (60.7, 2),
    "static 3": (53.0, 3),
    "static 4": (49.8, 4),
    "adaptive 0.99": (66.0, 2.1),
    "adaptive 0.95": (64.7, 2.8),
    "adaptive 0.9": (64.1, 3.3),
    "adaptive 0.8": (59.2, 4.2),
    "adaptive 0.6": (46.6, 6.1),
}
VARIANTS_IN = (4, 5)                    # of their tables
# Variants of training: (accuracy in %, tokens per forward) at threshold 0.9 ...
VARIANTS = {
    "default": (64.1, 3.3),
    "soft teacher": (62.5, 2.3),
    "ground truth": (66.4, 2.2),
    "bidirectional": (59.8, 3.1),
    "fixed k": (51.6, 2.7),
    "prefix loss": (64.6, 2.7),
}
# ... and accuracy in % at k = 1
VARIANTS_AT_K1 = {"default": 66.0, "soft teacher": 63.6, "ground truth": 67.9,
                  "bidirectional": 63.5, "fixed k": 54.1, "prefix loss": 66.6}

# MTP-D, arXiv 2603.23911, from a summary of it: a 2B model on AGIEval-en. What distillation, or the
# extension, does to (variant, against which)
HEADS = {
    ("one head", "one head, no distillation"): "acceptance 85.75% -> 88.98%",
    ("joint", "joint, no distillation"):
        "four heads, cumulative acceptance of the last 45.47% -> 52.96%, +22.9% speed",
    ("one head, repeated", "one head, repeated, no distillation"):
        "cumulative acceptance of draft 3 0.6% -> 26.70%",
    ("extension", "one head"): "1 -> 8 heads: about 3.05 times the speed",
}
HEADS_TOKENS = 350e9                    # that backbone and heads are trained on
