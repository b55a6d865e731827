"""
extras/lm_eval_adapter.py inside the real harness: a local task, so no hub is needed. Generated answers are those of
eval_gsm8k.py on the same prompts; log-likelihoods are those of plain passes through the model.
"""
import json
import sys

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is in requirements-dev.txt")

from conftest import train_briefly  # noqa: E402

import eval_gsm8k as evaluation  # noqa: E402
from data import WordProblems  # noqa: E402
from extras import lm_eval_adapter as adapter  # noqa: E402
from model import Transformer  # noqa: E402
from pretrained import InputError, resolve  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

LIMIT = 6
ANSWER = """
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
  - {metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true, ignore_punctuation: false,
     regexes_to_ignore: [",", "\\\\$", "(?s).*#### ", "\\\\.$"]}
"""
CHOOSE = """
doc_to_choice: [" three.", " four.", " a longer answer."]
doc_to_target: 1
metric_list: [{metric: acc}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of two tasks on six word problems: `local_sums` (generate_until) and `local_choice` (log-likelihoods)."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(WordProblems(0, "test")[i]) + "\n" for i in range(LIMIT)))
    common = {"rows": rows, "cache": folder / "cache"}
    (folder / "sums.yaml").write_text(ANSWER.format(name="local_sums", kind="generate_until", text="{{question}}\\n\\n",
                                                    **common) + GENERATE)
    (folder / "choice.yaml").write_text(ANSWER.format(name="local_choice", kind="multiple_choice", text="{{question}}",
                                                      **common) + CHOOSE)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The tiny model after two steps with k_max 3."""
    return train_briefly(tmp_path_factory.mktemp("trained"), "--k", 3)


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["lm_eval_adapter.py", *map(str, flags)])
    adapter.main()


@pytest.mark.parametrize("flags", [("--k", 1), ("--k", 3), ("--threshold", 0.3)])
def test_same_answers_as_eval_gsm8k(trained, tasks, tmp_path, monkeypatch, capsys, flags):
    stop = ("--max-new-tokens", 40, "--model", trained, "--batch-size", 4)
    run(monkeypatch, "--tasks", "local_sums", "--include", tasks, *flags, *stop, "--out", tmp_path / "harness")
    printed = capsys.readouterr().out
    harness = json.loads((tmp_path / "harness" / "results.json").read_text())
    monkeypatch.setattr(sys, "argv", [
        "eval_gsm8k.py", "--data", "wordproblems", "--limit", str(LIMIT), "--stop", "#### 7", "--prompt-format", "plain",
        *map(str, flags + stop), "--out", str(tmp_path / "ours")])
    evaluation.main()
    name = {"--k": "static {}", "--threshold": "adaptive {}"}[flags[0]].format(flags[1])
    table = json.loads((tmp_path / "ours" / "table.json").read_text())["table"]
    ours = next(row for row in table if row["strategy"] == name)
    assert harness["results"]["local_sums"]["exact_match,flexible-extract"] == ours["accuracy"]
    assert harness["tokens_per_forward"] == pytest.approx(ours["tokens_per_forward"]) and "tokens per forward" in printed
    texts = [json.loads(line)["text"] for line in (tmp_path / "ours" / "rows.jsonl").read_text().splitlines()[1:]
             if json.loads(line)["strategy"] == name]
    model = adapter.NanoMTP(str(trained), batch_size=4, max_new_tokens=40,
                            **{flags[0].removeprefix("--"): flags[1]})

    class Request:
        def __init__(self, i):
            self.args = (WordProblems(0, "test")[i]["question"] + "\n\n", {"until": ["#### 7"], "max_gen_toks": 40})

    assert model.generate_until([Request(i) for i in range(LIMIT)], disable_tqdm=True) == texts


def test_log_likelihoods_are_the_plain_models(trained, tasks, monkeypatch, capsys):
    run(monkeypatch, "--tasks", "local_choice", "--include", tasks, "--model", trained, "--k", 3)
    assert "local_choice" in capsys.readouterr().out
    model, folder = adapter.NanoMTP(str(trained), k=3), resolve(str(trained))
    plain, tokenizer = Transformer.from_pretrained(folder), Tokenizer(folder)

    class Request:
        args = ("Ava has 3 apples.", " Ben has 4.")

    (log_p, greedy), = model.loglikelihood([Request()], disable_tqdm=True)
    context, whole = tokenizer.encode(Request.args[0]), tokenizer.encode("".join(Request.args))
    n = len(whole)
    with torch.no_grad():
        logits = plain(torch.tensor([whole]), torch.arange(n)[None], torch.ones(n, n, dtype=torch.bool).tril())[0]
    logits[:, tokenizer.mask_id] = -torch.inf
    expected = sum(logits[i - 1].log_softmax(-1)[whole[i]].item() for i in range(len(context), n))
    assert log_p == pytest.approx(expected, rel=1e-4) and greedy is False

    class Text:
        args = ("Ava has 3 apples and Ben has 4. " * 80,)           # longer than the context: several windows

    assert len(tokenizer.encode(Text.args[0])) > plain.config.max_position_embeddings
    total, = model.loglikelihood_rolling([Text()], disable_tqdm=True)
    assert -20 * len(tokenizer.encode(Text.args[0])) < total < 0


def test_registered_and_refusals(trained, tasks, monkeypatch, tmp_path):
    from lm_eval.api.registry import get_model
    assert get_model("nanomtp") is adapter.NanoMTP
    (tmp_path / "file").write_text("")
    for flags, message in ((["--tasks", "no_such_task"], "no_such_task"), (["--tasks", "local_sums", "--k", 4], "1 to 3"),
                           (["--tasks", "local_sums", "--out", tmp_path / "file"], "cannot write")):
        with pytest.raises(InputError, match=message):
            run(monkeypatch, "--include", tasks, "--model", trained, *flags)
    model = adapter.NanoMTP(str(trained))

    class Request:
        args = ("a", {"do_sample": True, "temperature": 1.0, "until": []})

    with pytest.raises(InputError, match="sampling"):
        model.generate_until([Request()], disable_tqdm=True)
