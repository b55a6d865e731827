"""
The page to play with. Its numbers: what the replay finds in each pass against what decoding
emitted, and against one plain forward pass for each; what heads drafted, against what decoding was
fed. Its text: whatever a prompt spells stays text.
And the page in a browser, where one is installed: Chromium, moved by its own debugging protocol
over two pipes, so that keys and mouse are those of a user. (What it refuses is in test_cli.py.)
"""
import fcntl
import itertools
import json
import os
import re
import select
import shlex
import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import train_briefly
from test_cli import cli

from common.files import read_json
from common.machine import machine
from common.report import chunks_of
from heads import Drafter
from sample import accept, generate, load
from speculate import speculate
from studies import viewer

ATTACK = ("</script><script>document.title = 'owned'</script>"
          "<img src=x onerror='document.title = 1'> <!-- {{DATA}} & \u2028 \U0001f600")
QUESTION = "A farmer has 12 cows and buys 5 more. How many cows does she have?"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """k_max = 3, two steps away from the tiny model: slot 1 answers well, mask tokens guess."""
    return train_briefly(tmp_path_factory.mktemp("trained") / "out", "--k", 3, "--lr", 1e-4)


@pytest.fixture(scope="module")
def with_heads(tmp_path_factory):
    """The tiny model and three heads after a few steps: about half of their drafts stand."""
    return train_briefly(
        tmp_path_factory.mktemp("heads") / "out", "--heads", 3, "--draft-vocab", 200, "--steps", 8,
        "--batch-size", 8, "--lr", 5e-3, "--warmup", 2, "--cooldown", 0)


def loaded(trained):
    """(model, tokenizer)"""
    return load(trained, "cpu", torch.float32)[:2]


@pytest.fixture(scope="module")
def drafted(with_heads, tmp_path_factory):
    """(the page, its data) for two prompts, decoded with heads."""
    out = tmp_path_factory.mktemp("page") / "page.html"
    result = cli(viewer, QUESTION, "How many?", "--model", with_heads, "--max-new-tokens", 30,
                 "--out", out)
    assert result.code == 0 and "lossless 4 heads" in result.out, result
    return out, embedded(out)


@pytest.fixture(scope="module")
def written(trained, tmp_path_factory):
    """(the page, its data) for two prompts, at a threshold that drops some guesses."""
    out = tmp_path_factory.mktemp("page") / "page.html"
    result = cli(viewer, QUESTION, ATTACK, "--model", trained, "--threshold", 0.9,
                 "--max-new-tokens", 24, "--out", out)
    assert result.code == 0 and f"{out}: open it" in result.out, result
    return out, embedded(out)


def embedded(out):
    """The data of a page."""
    html = out.read_text(encoding="utf-8")
    return json.loads(re.search(r'type="application/json">(.*?)</script>', html, re.DOTALL)[1])


# --------------------------------------------------------------------------------------------------
# The replay

@torch.inference_mode()
def plain_pass(model, ids, k, mask_id):
    """The slow reference: text and k - 1 mask tokens in a causal pass. (k, V) probabilities."""
    fed = torch.tensor([ids + [mask_id] * (k - 1)])
    n = fed.shape[1]
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    logits = model(fed, torch.arange(n)[None], causal)[0, -k:].float()
    logits[:, mask_id] = -torch.inf
    return logits.softmax(dim=-1)


@pytest.mark.parametrize("k, threshold", [(1, None), (3, None), (3, 0.9)])
def test_replay_is_what_decoding_saw(k, threshold, trained):
    """Kept tokens and their confidences; and what was dropped was not confident enough."""
    model, tokenizer = loaded(trained)
    prompts = [tokenizer.prompt(question, "plain") for question in (QUESTION, "How many?")]
    results = generate(model, tokenizer, prompts, k, threshold, 40)
    dropped = 0
    for prompt, result in zip(prompts, results):
        passes = viewer.passes_of(model, prompt, result, k, tokenizer.mask_id, at_once=7)
        assert len(passes) == result.passes and all(len(slots) == k for slots in passes)
        confidences = iter(result.confidences)
        for n, (chunk, slots) in enumerate(zip(chunks_of(result), passes)):
            for token, best in zip(chunk, slots):
                p = dict(best)[token]
                assert token == best[0][0] or best[0][1] - p < 1e-4             # a near-tie
                assert p == pytest.approx(next(confidences), abs=1e-4)
                descending = sorted((p for _, p in best), reverse=True)
                assert [p for _, p in best] == descending and len(best) == 5
            if n < result.passes - 1:                                       # the last may be cut
                sure = torch.tensor([[best[0][1] for best in slots]])
                assert accept(sure, threshold).tolist() == [len(chunk)]
                dropped += k - len(chunk)
    assert (dropped > 0) == (threshold is not None)


def test_replay_is_a_plain_pass(trained):
    """One forward pass over all regions gives what one causal pass for each gives."""
    model, tokenizer = loaded(trained)
    prompt = tokenizer.prompt(QUESTION, "plain")
    result, = generate(model, tokenizer, [prompt], 3, 0.9, 12)
    passes = viewer.passes_of(model, prompt, result, 3, tokenizer.mask_id)
    for end, slots in zip(itertools.accumulate(result.chunks, initial=0), passes):
        slow = plain_pass(model, prompt + result.tokens[:end], 3, tokenizer.mask_id)
        for p, best in zip(slow, slots):
            shown = [q for _, q in best]
            assert shown == pytest.approx(p.topk(5).values.tolist(), abs=1e-5)
            assert shown == pytest.approx([p[i].item() for i, _ in best], abs=1e-5)


def test_replay_bidirectional(trained):
    """Where mask tokens see each other decoding and replay agree as well, on other numbers."""
    model, tokenizer = loaded(trained)
    tokenizer.stop_ids = set()
    prompt, first = tokenizer.prompt(QUESTION, "plain"), []
    for bidirectional in (False, True):
        model.config.raw["nanomtp"]["bidirectional"] = bidirectional
        result, = generate(model, tokenizer, [prompt], 3, None, 9)
        passes = viewer.passes_of(model, prompt, result, 3, tokenizer.mask_id)
        shown = [best[0][1] for slots in passes for best in slots]
        assert shown == pytest.approx(result.confidences, abs=1e-4)
        first.append(passes[0])
    causal, both = first
    assert causal[0] == both[0] and causal[1] != both[1]    # slot 1 stands on text, slot 2 does not


@pytest.mark.parametrize("k, threshold", [(4, None), (3, None), (4, 0.5)])
def test_replayed_drafts_are_those_that_decoding_was_fed(k, threshold, with_heads, monkeypatch):
    """Ids and probabilities, all of every pass. A threshold and a smaller k feed fewer."""
    model, tokenizer, _, heads = load(with_heads, "cpu", torch.float32)
    fed, passes = [], []
    real = Drafter.draft

    def spy(self, *arguments):
        ids, p = real(self, *arguments)
        fed.append(list(zip(ids[0].tolist(), p[0].tolist())))
        return ids, p

    for question in (QUESTION, "How many?"):
        prompt = tokenizer.prompt(question, "plain")
        with monkeypatch.context() as patch:
            patch.setattr(Drafter, "draft", spy)
            result, = speculate(model, tokenizer, [prompt], k, threshold, heads=heads)
        replayed = viewer.drafts_of(model, heads, prompt, result, tokenizer.mask_id)
        assert len(replayed) == result.passes and replayed[0] == []
        for ours, theirs, (n, stood) in zip(replayed[1:], fed, result.drafts):
            assert len(ours) == n <= k - 1
            assert [i for i, _ in ours] == [i for i, _ in theirs[:n]]
            assert [p for _, p in ours] == pytest.approx([p for _, p in theirs[:n]], abs=1e-5)
        passes += result.drafts
        fed.clear()
    assert {stood for _, stood in passes} >= {0, 1}
    assert ({n for n, _ in passes} == {k - 1}) == (threshold is None)


# --------------------------------------------------------------------------------------------------
# The file

def test_page_holds_every_token(trained, written):
    """Both runs of both prompts: text, chunks, confidences."""
    _, data = written
    model, tokenizer = loaded(trained)
    assert [entry["text"] for entry in data["prompts"]] == [QUESTION, ATTACK]
    assert data["model"] == "out"
    for entry in data["prompts"]:
        prompt = tokenizer.prompt(entry["text"], "plain")
        assert [(run["name"], run["k"], run["threshold"]) for run in entry["runs"]] == [
            ("k = 1", 1, None), ("adaptive 0.9", 3, 0.9)]
        assert entry["runs"][0]["note"] == "plain greedy decoding"
        for run in entry["runs"]:
            result, = generate(model, tokenizer, [prompt], run["k"], run["threshold"], 24)
            assert [one["kept"] for one in run["passes"]] == result.chunks
            kept = [slot for one in run["passes"] for slot in one["slots"][:one["kept"]]]
            assert [slot["p"] for slot in kept] == pytest.approx(result.confidences, abs=1e-4)
            names = [viewer.spell(tokenizer, token) for token in result.tokens]
            assert [slot["name"] for slot in kept] == names
            for one in run["passes"]:
                assert len(one["slots"]) == run["k"]
                for slot in one["slots"]:
                    assert slot["name"] == slot["top"][slot["rank"] - 1][0]


def test_texts(trained):
    """Joined they are the text, but control tokens are named, and half characters are shown so."""
    tokenizer = loaded(trained)[1]
    ids = tokenizer.encode("caf\u00e9 \U0001f600\n") + [tokenizer.end_id]
    added = viewer.texts(tokenizer, ids)
    assert len(added) == len(ids)
    assert "".join(added).replace("\u2026", "") == "caf\u00e9 \U0001f600\n<|im_end|>"
    pieces = sum("\\x" in viewer.spell(tokenizer, i) for i in ids)
    assert added.count("\u2026") == pieces - 2                          # two characters were cut
    assert viewer.texts(tokenizer, ids[:-3])[-1] == "\ufffd"            # the answer ends in one
    assert viewer.spell(tokenizer, 10 ** 6) == "id 1000000"
    assert viewer.spell(tokenizer, tokenizer.encode("\x1b")[0]) == "?"


def test_page_needs_nothing_and_runs_nothing(written):
    """No address to fetch from, and no element that a prompt has opened."""
    html = written[0].read_text(encoding="utf-8")
    empty = viewer.TEMPLATE.read_text(encoding="utf-8")
    assert html.count("<") == empty.count("<")
    assert html.count("{{DATA}}") == 1                                  # the one in the prompt
    dangerous = r"https?:|//[a-z]|\bsrc=|url\(|@import|innerHTML|insertAdjacent|document\.write"
    assert not re.search(dangerous, empty)
    assert "default-src 'none'" in empty


def test_static_and_plain(trained, with_heads, tiny, tmp_path):
    """--k alone is static; with k = 1, asked for or all that a model can do, one column."""
    names = []
    for flags in (("--model", trained, "--k", 2), ("--model", trained, "--k", 1),
                  ("--model", with_heads, "--k", 2), ("--model", with_heads, "--k", 1),
                  ("--model", tiny, "--threshold", 0.5)):
        result = cli(viewer, *flags, "--max-new-tokens", 5, "--out", tmp_path / "a.html")
        assert result.code == 0 and ("has not been trained" in result.out) == (flags[1] == tiny)
        runs = embedded(tmp_path / "a.html")["prompts"][0]["runs"]
        names.append([run["name"] for run in runs])
    assert names == [["k = 1", "static 2"], ["k = 1"], ["k = 1", "lossless 2 heads"], ["k = 1"],
                     ["k = 1"]]
    assert os.listdir(tmp_path) == ["a.html"]                           # no temporary file stays


def test_page_of_heads(with_heads, drafted):
    """The text of k = 1; which drafts it came from, and which fell where it goes another way."""
    model, tokenizer, _, heads = load(with_heads, "cpu", torch.float32)
    kinds = {"stood": 0, "fell": 0, "behind": 0}
    for entry in drafted[1]["prompts"]:
        plain, run = entry["runs"]
        assert (plain["name"], run["name"]) == ("k = 1", "lossless 4 heads")
        assert (run["k"], run["note"]) == (4, "the same text as k = 1")
        prompt = tokenizer.prompt(entry["text"], "plain")
        result, = speculate(model, tokenizer, [prompt], 4, max_new_tokens=30, heads=heads)
        assert [one["kept"] for one in run["passes"]] == result.chunks
        kept = [slot for one in run["passes"] for slot in one["slots"][:one["kept"]]]
        for slot, alone in zip(kept, plain["passes"], strict=True):     # k = 1 knows no drafts
            alone, = alone["slots"]
            assert (slot["text"], slot["name"]) == (alone["text"], alone["name"])
            assert slot["p"] == pytest.approx(alone["p"], abs=1e-4) and slot["rank"] == 1
            assert [name for name, _ in slot["top"]][0] == slot["name"]
            assert [p for _, p in slot["top"]] == pytest.approx(
                [p for _, p in alone["top"]], abs=1e-4)

        first, *others = run["passes"]
        assert [slot["role"] for slot in first["slots"]] == ["the model's own token"]
        for one, (fed, stood) in zip(others[:-1], result.drafts):       # the last one may be cut
            *right, own = one["slots"][:stood + 1]
            wrong = one["slots"][stood + 1:]
            assert len(right) + len(wrong) == fed == 3 and one["kept"] == stood + 1
            assert own["role"] == "the model's own token"
            assert [slot["role"] for slot in right + wrong] == ["draft 1", "draft 2", "draft 3"]
            assert all("would have written" in slot["why"] for slot in right)
            for place, slot in enumerate(wrong):
                if place == 0:
                    assert slot["name"] != own["name"] and slot["top"] == own["top"]
                    assert slot["why"].startswith("fell: in its place the model itself writes")
                else:
                    assert slot["top"] == [] and slot["rank"] is None
                    assert f"fell: it stands behind draft {stood + 1}, which is" in slot["why"]
            kinds["stood"] += len(right)
            kinds["fell"] += len(wrong[:1])
            kinds["behind"] += len(wrong[1:])
    assert min(kinds.values()) > 0, kinds


def test_a_draft_behind_the_end(with_heads, tmp_path):
    """The limit is reached at a draft that stood: the others were drafted in vain."""
    model, tokenizer, _, heads = load(with_heads, "cpu", torch.float32)
    prompt = tokenizer.prompt(QUESTION, "plain")
    whole, = speculate(model, tokenizer, [prompt], 4, heads=heads)
    number = whole.chunks.index(3)                              # two drafts stood there, one fell
    out = tmp_path / "a.html"
    for emitted in (1, 2):
        limit = sum(whole.chunks[:number]) + emitted
        result = cli(viewer, QUESTION, "--model", with_heads, "--max-new-tokens", limit,
                     "--out", out)
        assert result.code == 0, result
        last = embedded(out)["prompts"][0]["runs"][1]["passes"][-1]
        assert last["kept"] == emitted and [slot["role"] for slot in last["slots"]] == [
            "draft 1", "draft 2", "draft 3"]
        assert all("would have written" in slot["why"] for slot in last["slots"][:emitted])
        assert {slot["why"] for slot in last["slots"][emitted:]} == {
            "not kept: it stands behind the end of the answer"}


def test_what_it_shows_is_kept(trained, tmp_path):
    """--json: the page can be drawn from it again."""
    out, kept = tmp_path / "a.html", tmp_path / "a.json"
    result = cli(viewer, "--model", trained, "--max-new-tokens", 5, "--out", out, "--json", kept)
    assert result.code == 0, result
    record = read_json(kept)
    assert {"commit", "command", "device"} <= record.keys()
    shown = {name: record[name] for name in ("model", "prompts")}
    assert viewer.page(shown) == out.read_text(encoding="utf-8")


def test_page_has_the_name_of_the_run(trained, tmp_path):
    """Whether its folder was given or the newest checkpoint, which are all called `latest`."""
    few = ("How many?", "--max-new-tokens", 1, "--k", 1, "--out", tmp_path / "a.html")
    for given in (trained, f"{trained}/", trained / "latest", f"{trained}/latest/"):
        assert cli(viewer, *few, "--model", given).code == 0
        assert embedded(tmp_path / "a.html")["model"] == "out" == trained.name
    cli(viewer, *few, "--model", trained / "step-2")
    assert embedded(tmp_path / "a.html")["model"] == "step-2"


def test_the_command_of_a_log_can_be_pasted(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["somewhere/studies/viewer.py", "How many?", "--k", "3"])
    command = machine(torch.device("cpu"))["command"]
    assert shlex.split(command) == ["python", "-m", "studies.viewer", "How many?", "--k", "3"]


# --------------------------------------------------------------------------------------------------
# In a browser

class Browser:
    """A headless Chromium: DevTools commands go to its descriptor 3, answers come from its 4."""

    def __init__(self, program, profile):
        inward, self.commands = os.pipe()
        self.answers, outward = os.pipe()
        # clear of 3 and 4
        theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (inward, outward)]
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{theirs[0]} 4>&{theirs[1]}', "bash", program,
             "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
             "--no-first-run", "--hide-scrollbars", "--remote-debugging-pipe",
             f"--user-data-dir={profile}", "about:blank"],
            pass_fds=theirs, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL)
        for end in (inward, outward, *theirs):
            os.close(end)
        self.buffer, self.number, self.session, self.events = b"", itertools.count(1), {}, []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        attached = self("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method, **parameters):
        """Send a command and wait for its answer; what happens meanwhile is kept in `events`."""
        number = next(self.number)
        message = {"id": number, "method": method, "params": parameters, **self.session}
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + 120
        while True:
            while b"\0" not in self.buffer:
                left = max(0, deadline - time.monotonic())
                ready, _, _ = select.select([self.answers], [], [], left)
                more = os.read(self.answers, 2 ** 20) if ready else b""
                if not more:
                    self.process.kill()
                    raise ConnectionError("it died" if ready else "it does not answer")
                self.buffer += more
            line, self.buffer = self.buffer.split(b"\0", 1)
            reply = json.loads(line)
            if reply.get("id") == number:
                assert "error" not in reply, reply
                return reply["result"]
            self.events.append(reply)

    def js(self, expression):
        """The value of an expression in the page."""
        reply = self("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    def open(self, address):
        self("Page.navigate", url="about:blank")        # else a changed fragment loads nothing anew
        self("Page.navigate", url=address)
        self.until("location.href.startsWith('file') && document.readyState === 'complete'")

    def until(self, condition):
        deadline = time.monotonic() + 60
        while not self.js(condition):
            assert time.monotonic() < deadline, condition
            time.sleep(0.05)

    def press(self, key, code):
        for kind in ("rawKeyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def move_mouse(self, x, y):
        self("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screen(self, width, height, scheme="light"):
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
             mobile=width < 500)
        wanted = {"name": "prefers-color-scheme", "value": scheme}
        self("Emulation.setEmulatedMedia", features=[wanted])

    def close(self):
        self.process.terminate()
        self.process.wait(60)
        os.close(self.commands)
        os.close(self.answers)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is installed")
    try:
        started = Browser(program, tmp_path_factory.mktemp("profile"))
    except (OSError, ConnectionError) as error:         # such as a package's stub, which cannot run
        pytest.skip(f"{program} is installed and does not start: {error}")
    yield started
    started.close()


SHOWN = """
    [...document.querySelectorAll('section')].map(column =>
        [...column.querySelectorAll('.token')]
            .filter(token => token.checkVisibility({visibilityProperty: true}))
            .map(token => [token.closest('.drafts') !== null, token.info.slot.name]))"""


def drawn(name):
    return name.replace(" ", "\u2423").replace("\n", "\u21b5")


def expected(run, passes):
    """What a column should show after so many passes: [is it a draft, name] of each token."""
    tokens = [[False, slot["name"]] for one in run["passes"][:passes]
              for slot in one["slots"][:one["kept"]]]
    if 0 < passes <= len(run["passes"]):
        current = run["passes"][passes - 1]
        tokens += [[True, slot["name"]] for slot in current["slots"][current["kept"]:]]
    return tokens


def test_page_replays(browser, written):
    """Address, arrow keys and buttons decide what both columns show, and what counters say."""
    out, data = written
    runs = data["prompts"][0]["runs"]
    last, first_done = (len(run["passes"]) for run in runs)
    assert first_done < last
    browser.screen(1200, 900)
    browser.open(f"{out.as_uri()}#pass=3")
    assert browser.js("document.querySelector('#prompt').textContent") == QUESTION
    assert browser.js(SHOWN) == [expected(run, 3) for run in runs]
    assert any(draft for draft, _ in expected(runs[1], 3))              # or there was little to see
    browser.js("document.querySelector('#slider').focus()")
    browser.press("ArrowRight", 39)
    assert browser.js(SHOWN) == [expected(run, 4) for run in runs]
    browser.press("Home", 36)
    assert browser.js(SHOWN) == [[], []]
    browser.js("document.querySelector('#next').click()")
    assert browser.js(SHOWN) == [expected(run, 1) for run in runs]

    browser.js("document.querySelector('#play').click()")               # until the right is done
    browser.until(f"document.querySelector('#slider').valueAsNumber >= {first_done}")
    browser.js("document.querySelector('#play').click()")
    now = browser.js("document.querySelector('#slider').valueAsNumber")
    assert browser.js(SHOWN) == [expected(run, now) for run in runs]
    left, right = browser.js(
        "[...document.querySelectorAll('.race output')].map(o => o.textContent)")
    tokens = sum(one["kept"] for one in runs[1]["passes"])
    rate = tokens / first_done
    assert right == f"{tokens} tokens / {first_done} passes = {rate:.2f} per forward \u2714 done"
    assert left.startswith(f"{now} tokens / {now} passes = 1.00")
    assert ("done" in left) == (now == last)

    browser.open(out.as_uri())                                          # no fragment: all of it
    assert browser.js(SHOWN) == [expected(run, last) for run in runs]
    chunk = "getComputedStyle(document.querySelectorAll('section:last-child .chunk')[{}])"
    colours = {browser.js(f"{chunk.format(i)}.backgroundColor") for i in (0, 1)}
    assert len(colours) == 2
    assert browser.js(f"{chunk.format(0)}.borderTopWidth") == "1px"


def test_page_tells_a_tokens_story(browser, written):
    """Mouse, keyboard and address lead to the same: confidence, rank, slot, pass, alternatives."""
    out, data = written
    run = data["prompts"][0]["runs"][1]
    slots = [(n, j, slot) for n, one in enumerate(run["passes"])
             for j, slot in enumerate(one["slots"][:one["kept"]])]

    def facts():
        return browser.js("document.querySelector('#details').textContent")

    def check(index):
        n, j, slot = slots[index]
        text = facts()
        assert f"confidence {slot['p']:.3f}, rank {slot['rank']}" in text
        assert f"pass {n + 1}, slot {j + 1} of 3; token {index + 1} of the answer" in text
        top = browser.js(
            "[...document.querySelectorAll('#top li')].map(l => l.lastChild.textContent)")
        assert top == [f"{p:.3f}" for _, p in slot["top"]]

    browser.screen(1200, 900)
    browser.open(f"{out.as_uri()}#run=2&token=5")
    check(4)
    x, y = browser.js("(b => [b.x + b.width / 2, b.y + b.height / 2])"
                      "(runs[1].tokens[7].element.getBoundingClientRect())")
    browser.move_mouse(x, y)
    check(7)
    browser.move_mouse(0, 0)
    check(7)                                                            # it stays for reading
    browser.js("runs[1].tokens[0].element.focus()")
    check(0)
    browser.press("Tab", 9)
    check(1)
    assert browser.js("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.until("location.hash === `#prompt=1&pass=${last}&run=2&token=2`")    # it follows
    browser.js("location.hash = '#pass=3'")
    browser.until("pass === 3")
    browser.js("document.querySelector('.drafts:not([hidden]) .token').focus()")
    assert "below the threshold 0.9" in facts()


def test_page_tells_of_drafts(browser, drafted):
    """What stood, what the model itself wrote, what fell: with role and reason, without slots."""
    out, data = drafted
    run = data["prompts"][0]["runs"][1]
    passes = list(enumerate(run["passes"], 1))
    some_stood = next(n for n, one in passes if 1 < one["kept"] < len(one["slots"]))
    none_stood = next(n for n, one in passes if one["kept"] == 1 < len(one["slots"]))
    browser.screen(1200, 900)
    browser.events.clear()
    for number in (some_stood, none_stood):
        browser.open(f"{out.as_uri()}#pass={number}")
        assert browser.js(SHOWN) == [expected(run, number) for run in data["prompts"][0]["runs"]]
        one = run["passes"][number - 1]
        first = sum(earlier["kept"] for earlier in run["passes"][:number - 1])
        for place, slot in enumerate(one["slots"]):
            kept = place < one["kept"]
            element = f"runs[1].tokens[{first + place}].element" if kept else (
                "document.querySelectorAll('section:last-child .drafts:not([hidden]) .token')"
                f"[{place - one['kept']}]")
            browser.js(element + ".click()")
            rank = f", rank {slot['rank'] or 'beyond 5'}" if slot["top"] else ""
            answer = f"; token {first + place + 1} of the answer" if kept else ""
            assert browser.js("document.querySelector('#facts').textContent") == (
                f"{drawn(slot['name'])} confidence {slot['p']:.3f}{rank}"
                f"lossless 4 heads: pass {number}, {slot['role']}{answer}{slot['why']}")
            label = browser.js(element + ".ariaLabel")
            assert label.endswith(f"pass {number}, {slot['role']}" + ("" if kept else ", not kept"))
            tops = browser.js("document.querySelectorAll('#top li').length")
            assert tops == len(slot["top"])
    assert all(event["method"] != "Runtime.exceptionThrown" for event in browser.events)


def test_page_keeps_text_text(browser, written):
    """The hostile prompt is shown letter by letter; no element of it came to be, nothing went
    wrong, and nothing was fetched."""
    browser.events.clear()
    browser.open(f"{written[0].as_uri()}#prompt=2")
    assert browser.js("document.querySelector('#prompt').textContent") == ATTACK
    assert browser.js("document.title") == "nanoMTP: out"
    assert browser.js("document.querySelectorAll('img').length") == 0
    assert browser.js("document.querySelectorAll('script').length") == 2
    assert all(event["method"] != "Runtime.exceptionThrown" for event in browser.events)
    fetched = {event["params"]["request"]["url"].split(":")[0] for event in browser.events
               if event["method"] == "Network.requestWillBeSent"}
    assert fetched <= {"file", "about", "data"}


def slots_of(*pairs):
    return [{"text": text, "name": text, "p": p, "rank": 1, "top": [[text, p]]}
            for text, p in pairs]


def test_page_draws_white_space_and_says_why_not(browser, tmp_path):
    """A line break can be pointed at, breaks the line and ends its box; a model's text stays text;
    and each unkept token has its reason."""
    passes = [
        {"kept": 3, "slots": slots_of(("a", 0.9), ("\n", 0.9), ("b", 0.9))},
        {"kept": 1, "slots": slots_of(("<i>c</i>\n\n", 0.9), (" ", 0.25), ("?", 0.9))},
        {"kept": 1, "slots": slots_of(("-", 0.25), ("+", 0.9), ("*", 0.9))},
        {"kept": 2, "slots": slots_of(("d\ne", 0.9), ("\n", 0.9), ("f", 0.75))},
    ]
    run = {"name": "x", "note": "", "k": 3, "threshold": 0.5, "passes": passes}
    data = {"model": "<b>", "prompts": [{"text": "", "runs": [run]}]}
    out = tmp_path / "page.html"
    out.write_text(viewer.page(data), encoding="utf-8")
    browser.screen(1200, 900)
    browser.open(f"{out.as_uri()}#pass=2")
    assert browser.js("runs[0].tokens.map(({element}) => element.textContent)") == [
        "a", "\u21b5", "b", "<i>c</i>\u21b5\n\u21b5", "-", "d\u21b5\ne", "\u21b5"]
    assert browser.js("document.querySelector('.answer').textContent") == (
        "a\u21b5\nb<i>c</i>\u21b5\n\u21b5\n\u2423 0.25? 0.90-+ 0.90* 0.90d\u21b5\ne\u21b5\nf 0.75")
    tops = browser.js("runs[0].tokens.map(({element}) => "
                      "[...element.getClientRects()].map(box => Math.round(box.top)))")
    assert tops[0] == tops[1] and tops[2][0] > tops[1][0] and tops[2][0] == tops[3][0] < tops[3][1]
    widths = browser.js("runs[0].tokens.map(({element}) => element.getBoundingClientRect().width)")
    assert all(width > 2 for width in widths)

    below, behind = "not kept: below the threshold 0.5", "not kept: it stands behind slot {}, which"
    for number, reasons in {2: [below, behind.format(2)], 3: [behind.format(1)] * 2,
                            4: ["not kept: it stands behind the end of the answer"]}.items():
        for place, reason in enumerate(reasons):
            browser.js(f"show({number}); document.querySelectorAll("
                       f"'.drafts:not([hidden]) .token')[{place}].click()")
            assert reason in browser.js("document.querySelector('#details').textContent")


def test_page_on_a_phone_and_in_the_dark(browser, written):
    """360 px: nothing sticks out, columns stack. Dark: light on dark, black on every chunk."""
    boxes = ("[...document.querySelectorAll('section')]"
             ".map(s => s.getBoundingClientRect()).map(b => [b.left, b.top])")
    colour = "getComputedStyle(document.querySelector('{}')).{}"
    for width, scheme, page in ((360, "light", "rgb(255, 255, 255)"),
                                (1200, "dark", "rgb(22, 24, 28)")):
        browser.screen(width, 740, scheme)
        browser.open(f"{written[0].as_uri()}#prompt=2&pass=3&run=2&token=2")
        assert browser.js("document.documentElement.scrollWidth") <= width
        (left, top), (right, below) = browser.js(boxes)
        if width == 360:
            assert left == right and top < below
        else:
            assert left < right and top == below
        assert browser.js(colour.format("body", "backgroundColor")) == page
        assert browser.js(colour.format(".chunk .token", "color")) == "rgb(0, 0, 0)"
