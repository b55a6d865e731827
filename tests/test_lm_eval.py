"""
studies/lm_eval_adapter.py inside the real harness: local tasks, so no hub is needed. Answers are
those of eval_gsm8k.py on the same prompts; log-likelihoods are those of plain passes.
"""
import functools
import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is in requirements-dev.txt")

from conftest import train_briefly  # noqa: E402
from test_cli import assert_refused, cli  # noqa: E402

import eval_gsm8k as evaluation  # noqa: E402
from common.cli import InputError  # noqa: E402
from common.files import read_json  # noqa: E402
from common.hub import resolve  # noqa: E402
from common.tokenizer import Tokenizer  # noqa: E402
from common.wordproblems import WordProblems  # noqa: E402
from model import Transformer  # noqa: E402
from studies import lm_eval_adapter as adapter  # noqa: E402

LIMIT = 6
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}, cache_dir: {cache}}}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
metadata: {{version: 1}}
"""
GENERATE = """
doc_to_target: "{{answer.split('####')[-1].strip()}}"
generation_kwargs: {until: ["#### 7"], do_sample: false, max_gen_toks: 40}
filter_list:
  - name: flexible-extract
    filter:
      - {function: regex, group_select: -1, regex_pattern: "(-?[$0-9.,]{2,})|(-?[0-9]+)"}
      - {function: take_first}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true,
     ignore_punctuation: false, regexes_to_ignore: [",", "\\\\$", "(?s).*#### ", "\\\\.$"]}
"""
CHOOSE = """
doc_to_choice: [" three.", " four.", " a longer answer."]
doc_to_target: 1
metric_list: [{metric: acc}]
"""


@pytest.fixture(autouse=True)
def no_other_tasks(monkeypatch):
    """The harness looks through thousands of its own task files: seconds, in every run."""
    manager = functools.partial(adapter.TaskManager, include_defaults=False)
    monkeypatch.setattr(adapter, "TaskManager", manager)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of two tasks on six word problems: `local_sums`, where a text is to be generated,
    and `local_choice`, where log-likelihoods decide."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = folder / "rows.jsonl"
    problems = [WordProblems(0, "test")[i] for i in range(LIMIT)]
    rows.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    common = {"rows": rows, "cache": folder / "cache"}
    text = "{{question}}"
    sums = TASK.format(name="local_sums", kind="generate_until", text=text + "\\n\\n", **common)
    choice = TASK.format(name="local_choice", kind="multiple_choice", text=text, **common)
    (folder / "sums.yaml").write_text(sums + GENERATE)
    (folder / "choice.yaml").write_text(choice + CHOOSE)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The tiny model after two steps with k_max 3."""
    return train_briefly(tmp_path_factory.mktemp("trained"), "--k", 3)


@pytest.fixture(scope="module")
def with_heads(tmp_path_factory):
    """The tiny model and three heads after a few steps: about half of their drafts stand."""
    return train_briefly(
        tmp_path_factory.mktemp("heads") / "out", "--heads", 3, "--steps", 8, "--batch-size", 8,
        "--lr", 5e-3, "--warmup", 2, "--cooldown", 0)


@pytest.fixture(scope="module")
def with_adapters(tmp_path_factory):
    """The tiny model as it was, with adapters after a few steps; no folder but that of adapters."""
    return train_briefly(
        tmp_path_factory.mktemp("adapters") / "out", "--adapters", 16, "--k", 3, "--steps", 40,
        "--batch-size", 8, "--lr", 1e-2, "--warmup", 2, "--cooldown", 20)


@pytest.mark.parametrize("checkpoint, flags, name", [
    ("with_adapters", {"threshold": 0.3}, "adaptive 0.3"),
    ("trained", {"k": 3}, "static 3"), ("trained", {"threshold": 0.3}, "adaptive 0.3"),
    ("with_heads", {}, "lossless 4 heads"), ("with_heads", {"k": 2}, "lossless 2 heads")])
def test_same_answers_as_eval_gsm8k(checkpoint, flags, name, tasks, tmp_path, request):
    trained = request.getfixturevalue(checkpoint)
    common = [part for key, value in flags.items() for part in (f"--{key}", value)]
    common += ["--max-new-tokens", 40, "--model", trained, "--batch-size", 4]
    result = cli(adapter, "--tasks", "local_sums", "--include", tasks, *common,
                 "--out", tmp_path / "harness")
    assert result.code == 0 and "tokens per forward" in result.out, result
    harness = read_json(tmp_path / "harness" / "results.json")
    result = cli(evaluation, "--data", "wordproblems", "--limit", LIMIT, "--stop", "#### 7",
                 "--prompt-format", "plain", *common, "--out", tmp_path / "ours")
    assert result.code == 0, result
    table = read_json(tmp_path / "ours" / "table.json")["table"]
    ours, = (entry for entry in table if entry["strategy"] == name)
    accuracy = harness["results"]["local_sums"]["exact_match,flexible-extract"]
    assert accuracy == ours["accuracy"]
    assert harness["tokens_per_forward"] == pytest.approx(ours["tokens_per_forward"])
    assert ours["tokens_per_forward"] > 1.1

    lines = (tmp_path / "ours" / "rows.jsonl").read_text().splitlines()[1:]
    texts = [row["text"] for row in map(json.loads, lines) if row["strategy"] == name]
    model = adapter.NanoMTP(str(trained), batch_size=4, max_new_tokens=40, **flags)
    settings = {"until": ["#### 7"], "max_gen_toks": 40}
    requests = [SimpleNamespace(args=(WordProblems(0, "test")[i]["question"] + "\n\n", settings))
                for i in range(LIMIT)]
    assert model.generate_until(requests, disable_tqdm=True) == texts


def test_adapters_change_no_log_likelihood(with_adapters):
    """Nothing but decoding feeds mask tokens: the harness scores the start model."""
    requests = [SimpleNamespace(args=("Ava has 3 apples.", " Ben has 4."))]
    ours, start = (adapter.NanoMTP(str(name)).loglikelihood(requests, disable_tqdm=True)
                   for name in (with_adapters, "tiny"))
    assert ours == start


def test_log_likelihoods_are_the_plain_models(trained, tasks):
    result = cli(adapter, "--tasks", "local_choice", "--include", tasks, "--model", trained,
                 "--k", 3)
    assert result.code == 0 and "local_choice" in result.out, result
    model, folder = adapter.NanoMTP(str(trained), k=3), resolve(str(trained))
    plain, tokenizer = Transformer.from_pretrained(folder), Tokenizer(folder)

    request = SimpleNamespace(args=("Ava has 3 apples.", " Ben has 4."))
    (log_p, greedy), = model.loglikelihood([request], disable_tqdm=True)
    context, whole = tokenizer.encode(request.args[0]), tokenizer.encode("".join(request.args))
    n = len(whole)
    with torch.no_grad():
        causal = torch.ones(n, n, dtype=torch.bool).tril()
        logits = plain(torch.tensor([whole]), torch.arange(n)[None], causal)[0]
    logits[:, tokenizer.mask_id] = -torch.inf
    p = logits.log_softmax(-1)
    expected = sum(p[i - 1, whole[i]].item() for i in range(len(context), n))
    assert log_p == pytest.approx(expected, rel=1e-4) and greedy is False

    # longer than the context: several windows
    long = SimpleNamespace(args=("Ava has 3 apples and Ben has 4. " * 80,))
    length = len(tokenizer.encode(long.args[0]))
    assert length > plain.config.max_position_embeddings
    total, = model.loglikelihood_rolling([long], disable_tqdm=True)
    assert -20 * length < total < 0


def test_unknown_task_leaves_no_folder(trained, tasks, tmp_path):
    """One line; nor is anything deleted that was there."""
    flags = ("--tasks", "nosuch", "--include", tasks, "--model", trained)
    assert_refused(cli(adapter, *flags, "--out", tmp_path / "out"), "nosuch")
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert_refused(cli(adapter, *flags, "--out", tmp_path / "mine"), "nosuch")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


def test_registered_and_greedy(trained):
    from lm_eval.api.registry import get_model

    assert get_model("nanomtp") is adapter.NanoMTP
    model = adapter.NanoMTP(str(trained))
    request = SimpleNamespace(args=("a", {"do_sample": True, "temperature": 1.0, "until": []}))
    with pytest.raises(InputError, match="sampling"):
        model.generate_until([request], disable_tqdm=True)
