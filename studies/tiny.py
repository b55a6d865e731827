"""
The tiny model before its first training step: configuration and tokenizer, without weights.

    python -m extras.tiny                                       # writes them into checkpoints/tiny (they are there already)
    python train.py --preset pretrain-tiny                      # draws random weights for them and trains: about an hour

A byte-level BPE is trained on word problems of the training split by Hugging Face's `tokenizers` (a development
requirement). It cuts text as SmolLM2's does, every digit by itself, and has its first three control tokens.
"""
from pathlib import Path

from data import WordProblems
from pretrained import ArgumentParser, read_json, run, write_json

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]       # ids 0, 1, 2
END = 2
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 192,
    "intermediate_size": 640, "num_hidden_layers": 4, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 64,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": None,
    "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True, "initializer_range": 0.02,
    "bos_token_id": 1, "eos_token_id": END, "torch_dtype": "float32",
}


def train_tokenizer(problems, vocab_size):
    """A tokenizers.Tokenizer trained on the first `problems` rows of the training split."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=CONTROL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    rows = WordProblems(seed=0)
    texts = ("{question}\n\n{answer}".format(**rows[i]) for i in range(problems))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def main():
    parser = ArgumentParser(prog="-m extras.tiny", description=__doc__)
    parser.add_argument("--out", default=str(Path(__file__).resolve().parent.parent / "checkpoints" / "tiny"),
                        help="folder to write into (checkpoints/tiny)")
    parser.add_argument("--limit", type=int, default=20_000, help="word problems to train on (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=1024, help="default: %(default)s")
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(args.limit, args.vocab_size)
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(out / "tokenizer.json", read_json(out / "tokenizer.json"))
    write_json(out / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, "clean_up_tokenization_spaces": False,
        "bos_token": CONTROL[1], "eos_token": CONTROL[END], "pad_token": CONTROL[END],
        "model_max_length": CONFIG["max_position_embeddings"]})
    write_json(out / "generation_config.json", {"bos_token_id": 1, "eos_token_id": END, "pad_token_id": END})
    write_json(out / "config.json", {**CONFIG, "vocab_size": tokenizer.get_vocab_size()})
    print(f"{out}: {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    run(main)
