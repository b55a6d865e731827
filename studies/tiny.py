"""
How checkpoints/tiny and checkpoints/tiny-mtp were made.

The tiny model before its first step is a configuration and a tokenizer, without weights: a
byte-level BPE, trained on word problems of the training split by Hugging Face's `tokenizers` (a
development requirement). It cuts text as SmolLM2's does, every digit by itself, and has its first
three control tokens. Training then draws random weights for it:

    python -m studies.tiny                              # into checkpoints/tiny, where they are now
    python train.py --preset pretrain-tiny              # an hour; its model.safetensors goes there

The trained one is the newest checkpoint of a run, its weights rounded to bf16, without what only
training needs:

    python train.py --k 8 --steps 1000 --cooldown 400 --out out-k8
    python -m studies.tiny --trained out-k8             # into checkpoints/tiny-mtp

Of a run with heads, these alone are rounded: the start model stays as it is.
"""
import json
from pathlib import Path

import torch

from common import cli
from common.cli import ArgumentParser, InputError
from common.files import new_folder, write_json
from common.hub import HERE, resolve
from common.tokenizer import Tokenizer
from common.wordproblems import WordProblems
from heads import load_heads, save_heads
from model import Transformer, save_pretrained
from studies import needs

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]       # ids 0, 1, 2
START, END = 1, 2
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "hidden_size": 192, "intermediate_size": 640, "num_hidden_layers": 4,
    "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 64,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "rope_scaling": None, "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True,
    "initializer_range": 0.02, "bos_token_id": START, "eos_token_id": END,
    "torch_dtype": "float32",
}


def train_tokenizer(problems, vocab_size):
    """A tokenizers.Tokenizer trained on the first `problems` rows of the training split."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=CONTROL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    rows = WordProblems(seed=0)
    texts = ("{question}\n\n{answer}".format(**rows[i]) for i in range(problems))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_start(out, problems, vocab_size):
    """Tokenizer and configuration into `out`; what else is there, such as weights, stays."""
    needs("tokenizers")
    out = cli.output_folder(out)
    tokenizer = train_tokenizer(problems, vocab_size)
    write_json(out / "tokenizer.json", json.loads(tokenizer.to_str()))
    write_json(out / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False,
        "clean_up_tokenization_spaces": False, "bos_token": CONTROL[START],
        "eos_token": CONTROL[END], "pad_token": CONTROL[END],
        "model_max_length": CONFIG["max_position_embeddings"]})
    write_json(out / "generation_config.json",
               {"bos_token_id": START, "eos_token_id": END, "pad_token_id": END})
    write_json(out / "config.json", CONFIG | {"vocab_size": tokenizer.get_vocab_size()})
    print(f"{out}: {tokenizer.get_vocab_size()} tokens")


def write_trained(out, run):
    """The newest checkpoint of a run of train.py into the folder `out`, in bf16."""
    folder = resolve(run)
    model, tokenizer = Transformer.from_pretrained(folder, torch.bfloat16), Tokenizer(folder)
    note = model.config.raw.get("nanomtp")
    if note is None:
        raise InputError(f"{run} has not been trained for several tokens per pass (train.py)")
    heads = load_heads(folder, torch.bfloat16)
    with new_folder(out) as temporary:
        if heads:
            save_heads(heads, model, folder, temporary)
        else:
            save_pretrained(model, temporary)
        tokenizer.save(temporary)
    megabytes = sum(file.stat().st_size for file in Path(out).iterdir()) / 1e6
    print(f"{out}: k_max {note['k_max']}, {note['steps']} steps, {megabytes:.1f} MB")


def main():
    parser = ArgumentParser(prog="-m studies.tiny", description=__doc__)
    add = parser.add_argument
    add("--out", help="folder to write (checkpoints/tiny; with --trained checkpoints/tiny-mtp)")
    add("--limit", type=int, default=20_000,
        help="word problems that the tokenizer is trained on (%(default)s)")
    add("--vocab-size", type=int, default=1024, help="most tokens that it has (%(default)s)")
    add("--trained", metavar="RUN", help="make the trained checkpoint instead, from this run")
    args = parser.parse_args()
    cli.at_least(args, limit=1, vocab_size=len(CONTROL) + 256)
    if args.trained:
        write_trained(args.out or HERE / "tiny-mtp", args.trained)
    else:
        write_start(args.out or HERE / "tiny", args.limit, args.vocab_size)


if __name__ == "__main__":
    cli.run(main)
