"""
common/custom_generate/generate.py inside transformers, against our own decoding: the same tokens in
as many passes, with a random model, a briefly trained one and the one in checkpoints/.

Both are one computation in two orders of summation: in fp32 their logits differ by up to 7e-5.
Where two tokens are as close as that, or a probability is to its threshold, either text would be
right. Seeds are chosen so that nothing here is: over all passes of the first test the two likeliest
tokens are at least 6e-4 apart, and probabilities at least 4e-4 from the threshold.
"""
import copy
import dataclasses
import shutil

import pytest
import torch
from conftest import (
    ROOT, TINY_VOCAB, random_prompts, tiny_tokenizer, tokens, train_briefly)
from test_style import imported

from adapters import load_adapted
from common.files import read_json
from common.hub import resolve
from common.tokenizer import Tokenizer
from common.wordproblems import WordProblems
from model import Transformer, save_pretrained
from sample import Strategy, choose_strategy
from speculate import decode

SOURCE = ROOT / "common" / "custom_generate" / "generate.py"
# (k, threshold, lossless); None: left out
CALLS = [(1, None, False), (2, None, False), (3, None, False), (None, 0.9, False),
         (3, 0.5, False), (None, None, False), (None, None, True), (2, None, True), (3, 0.5, True)]


@pytest.fixture(scope="module", autouse=True)
def module_cache(tmp_path_factory):
    """transformers copies a folder's code into its cache and runs the copy: not into the user's."""
    from transformers import dynamic_module_utils

    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", cache)
        patch.syspath_prepend(cache)
        yield


@dataclasses.dataclass
class Case:
    """One checkpoint: transformers' model of it and ours, and prompts that it can be asked."""
    folder: object
    theirs: object
    ours: object
    tokenizer: object
    prompts: list
    k_max: int

    def generate(self, prompt, strategy=(1, None, False), **more):
        """transformers' new tokens (prompt cut off), and its passes."""
        k, threshold, lossless = strategy
        given = {"k": k, "threshold": threshold, "lossless": lossless or None}
        given = {name: value for name, value in given.items() if value is not None}
        passes = []
        hook = self.theirs.register_forward_hook(lambda *_: passes.append(1))
        try:
            text = self.theirs.generate(
                torch.tensor([prompt]), custom_generate=str(self.folder), trust_remote_code=True,
                pad_token_id=0, **given, **more)
        finally:
            hook.remove()
        assert text.dtype == torch.long and text[0, :len(prompt)].tolist() == prompt
        return text[0, len(prompt):].tolist(), len(passes)

    def expected(self, prompt, strategy, max_new_tokens, stop_ids=None):
        """Our Answer."""
        k, threshold, lossless = strategy
        ours = choose_strategy(k, threshold, self.k_max, "narrow" if lossless else None)
        tokenizer = copy.copy(self.tokenizer)
        tokenizer.stop_ids = tokenizer.stop_ids if stop_ids is None else stop_ids
        answer, = decode(self.ours, tokenizer, [prompt], ours, max_new_tokens=max_new_tokens)
        return answer


def case(folder, tokenizer, prompts):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if (folder / "adapters").exists():
        ours = load_adapted(folder).eval()
    else:
        ours = Transformer.from_pretrained(folder).eval()
    return Case(folder, theirs, ours, tokenizer, prompts, theirs.config.nanomtp["k_max"])


def write_random(model, folder, k_max=4, bidirectional=False):
    """A model of ours and what belongs to it, as train.py would save it."""
    folder.mkdir()
    model.config.raw["nanomtp"] = {
        "mask_token_id": TINY_VOCAB, "k_max": k_max, "bidirectional": bidirectional}
    try:
        save_pretrained(model, folder)
    finally:
        del model.config.raw["nanomtp"]     # it is a fixture's
    tiny_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def random_case(drafter, tmp_path_factory):
    """Of its drafts nearly none is right; probabilities are all over the place."""
    folder = write_random(drafter, tmp_path_factory.mktemp("random") / "latest")
    prompts = random_prompts(11, seed=2) + [[77]]                   # the last one: a single token
    return case(folder, tokens(TINY_VOCAB, {2}), prompts)


@pytest.fixture(scope="module")
def brief_case(tiny, tmp_path_factory):
    """Two steps of training: the note in config.json is train.py's own."""
    folder = tmp_path_factory.mktemp("brief")
    run = train_briefly(folder / "run", "--model", tiny, "--k", 3)
    shutil.copytree(run / "latest", folder / "latest")
    return case(folder / "latest", Tokenizer(folder / "latest"), random_prompts(12, seed=5))


@pytest.fixture(scope="module")
def adapters_case(tiny, tmp_path_factory):
    """A model as it was, and adapters that act at mask tokens."""
    folder = tmp_path_factory.mktemp("adapters")
    run = train_briefly(folder / "run", "--model", tiny, "--k", 3, "--adapters", 4, "--steps", 30,
                        "--lr", 3e-2, "--warmup", 0, "--limit", 4, "--merge-start")
    shutil.copytree(run / "latest", folder / "latest")
    return case(folder / "latest", Tokenizer(folder / "latest"), random_prompts(12, seed=5))


@pytest.fixture(scope="module")
def tiny_mtp(tmp_path_factory):
    """Its drafts are mostly right."""
    folder = tmp_path_factory.mktemp("tiny-mtp") / "latest"
    shutil.copytree(resolve("tiny-mtp"), folder)
    tokenizer = Tokenizer(folder)
    questions = [WordProblems(5, "test")[i]["question"] for i in range(11)]
    prompts = [tokenizer.prompt(question, "plain") for question in questions]
    return case(folder, tokenizer, prompts + [prompts[0][:1]])


@pytest.fixture(scope="module", params=["random_case", "brief_case", "adapters_case", "tiny_mtp"])
def any_case(request):
    return request.getfixturevalue(request.param)


# --------------------------------------------------------------------------------------------------
# The same tokens in as many passes

@pytest.mark.parametrize("strategy", CALLS, ids=str)
def test_tokens_and_passes_are_ours(any_case, strategy):
    longest = []
    for prompt in any_case.prompts:
        expected = any_case.expected(prompt, strategy, max_new_tokens=25)
        new, passes = any_case.generate(prompt, strategy, max_new_tokens=25)
        assert new == expected.tokens and passes == expected.passes
        assert any_case.theirs.config.nanomtp["mask_token_id"] not in new
        longest.append(max(expected.chunks))
    assert strategy[0] != 1 or max(longest) == 1
    if strategy[0] in (2, 3) and strategy[1:] == (None, False):
        assert max(longest) == strategy[0]


def test_drafts_stand_and_fall(random_case, tiny_mtp):
    """Else the test above would say little about lossless decoding. Its text is that of k = 1."""
    seen = set()
    for some in (random_case, tiny_mtp):
        for prompt in some.prompts:
            answer = some.expected(prompt, (3, None, True), max_new_tokens=25)
            seen |= set(answer.drafts)
            plain = some.expected(prompt, (1, None, False), max_new_tokens=25)
            assert answer.tokens == plain.tokens
    assert {(2, 0), (2, 1), (2, 2), (0, 0)} <= seen


@pytest.mark.parametrize("strategy", CALLS, ids=str)
def test_stop_tokens_in_the_middle_of_a_chunk(random_case, strategy):
    """One or several; those of the generation config no longer count where others are given."""
    cut = 0
    for prompt in random_case.prompts[:6]:
        free = random_case.expected(prompt, strategy, 30, stop_ids=set())
        for stops in ({free.tokens[7]}, {free.tokens[10], free.tokens[20], 250}):
            expected = random_case.expected(prompt, strategy, 30, stop_ids=stops)
            given = next(iter(stops)) if len(stops) == 1 else sorted(stops)
            new, passes = random_case.generate(
                prompt, strategy, max_new_tokens=30, eos_token_id=given)
            assert new == expected.tokens and new[-1] in stops and not stops & set(new[:-1])
            assert passes == expected.passes
            cut += expected.chunks[-1] < free.chunks[len(expected.chunks) - 1]
    if strategy[0] == 3 and strategy[1] is None:
        assert cut > 3


@pytest.mark.parametrize("strategy", CALLS, ids=str)
def test_limits_cut_a_chunk(tiny_mtp, strategy):
    prompt = tiny_mtp.prompts[0]
    for limit in range(1, 10):
        expected = tiny_mtp.expected(prompt, strategy, limit)
        for given in ({"max_new_tokens": limit}, {"max_length": len(prompt) + limit}):
            new, passes = tiny_mtp.generate(prompt, strategy, **given)
            assert new == expected.tokens and len(new) == limit and passes == expected.passes


def test_the_mask_token_is_never_written(drafter, tmp_path):
    """Not even by a model that likes it best."""
    loving = copy.deepcopy(drafter)
    with torch.no_grad():
        loving.model.embed_tokens.weight[TINY_VOCAB] *= 10
    some = case(write_random(loving, tmp_path / "latest"), tokens(TINY_VOCAB, {2}),
                random_prompts(6, seed=6))
    liked = 0
    for prompt in some.prompts:
        for strategy in CALLS:
            expected = some.expected(prompt, strategy, max_new_tokens=20)
            new, passes = some.generate(prompt, strategy, max_new_tokens=20)
            assert new == expected.tokens and passes == expected.passes and TINY_VOCAB not in new
            best = some.theirs(torch.tensor([prompt + new])).logits.argmax(dim=-1)
            liked += (best == TINY_VOCAB).sum().item()
    assert liked > 50


# --------------------------------------------------------------------------------------------------
# How it is called

def test_as_the_docs_have_it(tiny_mtp):
    """With transformers' tokenizer, and with a streamer, which gets each pass's tokens together."""
    from transformers import AutoTokenizer

    class Streamer:
        def __init__(self):
            self.pieces, self.ended = [], False

        def put(self, ids):
            self.pieces.append(ids.flatten().tolist())

        def end(self):
            self.ended = True

    question = WordProblems(5, "test")[0]["question"]
    inputs = AutoTokenizer.from_pretrained(tiny_mtp.folder)(question + "\n\n", return_tensors="pt")
    streamer, prompt = Streamer(), tiny_mtp.prompts[0]
    text = tiny_mtp.theirs.generate(
        **inputs, max_new_tokens=100, custom_generate=str(tiny_mtp.folder), trust_remote_code=True,
        threshold=0.9, streamer=streamer, return_dict_in_generate=True).sequences
    expected = tiny_mtp.expected(prompt, (None, 0.9, False), 100)
    assert text.tolist() == [prompt + expected.tokens]
    assert streamer.pieces[0] == prompt and streamer.ended
    assert list(map(len, streamer.pieces[1:])) == expected.chunks and max(expected.chunks) > 4
    assert sum(streamer.pieces, []) == text[0].tolist()


def test_loaded_with_trust_it_needs_not_be_named(tiny_mtp):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        tiny_mtp.folder, dtype=torch.float32, trust_remote_code=True)
    prompt = torch.tensor([tiny_mtp.prompts[1]])
    expected = tiny_mtp.expected(tiny_mtp.prompts[1], (None, 0.9, False), 50).tokens
    named = {"custom_generate": str(tiny_mtp.folder), "trust_remote_code": True}
    for text in (model.generate(prompt, max_new_tokens=50),
                 model.generate(input_ids=prompt, max_new_tokens=50),
                 model.generate(prompt, max_new_tokens=50, **named)):
        assert text[0, prompt.shape[1]:].tolist() == expected


def test_eager_attention_writes_the_same(tiny_mtp):
    """A pass of several tokens on a filled cache is causal there, too."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        tiny_mtp.folder, dtype=torch.float32, attn_implementation="eager")
    eager = dataclasses.replace(tiny_mtp, theirs=model)
    for strategy in ((3, None, False), (None, 0.9, False), (None, None, True)):
        for prompt in tiny_mtp.prompts[:3]:
            expected = tiny_mtp.expected(prompt, strategy, 25)
            assert eager.generate(prompt, strategy, max_new_tokens=25) == (
                expected.tokens, expected.passes)


def test_plain_generate_is_as_it_was(tiny_mtp):
    """The file in the folder changes nothing for who does not ask for it, not even afterwards."""
    from transformers import AutoModelForCausalLM

    without = AutoModelForCausalLM.from_pretrained(resolve("tiny-mtp"), dtype=torch.float32)
    for prompt in tiny_mtp.prompts[:4]:
        tiny_mtp.generate(prompt, (3, None, False), max_new_tokens=10)
        ids, passes = torch.tensor([prompt]), []
        hook = tiny_mtp.theirs.register_forward_hook(lambda *_: passes.append(1))
        text = tiny_mtp.theirs.generate(ids, max_new_tokens=30, do_sample=False)
        hook.remove()
        assert torch.equal(text, without.generate(ids, max_new_tokens=30, do_sample=False))
        assert len(passes) == text.shape[1] - len(prompt)
        expected = tiny_mtp.expected(prompt, (1, None, False), max_new_tokens=30)
        assert text[0, len(prompt):].tolist() == expected.tokens


def test_what_it_refuses(tiny_mtp, drafter, tmp_path):
    """Clearly, and before any pass."""
    from transformers import AutoModelForCausalLM

    def refused(message, model=tiny_mtp.theirs, ids=((5, 6, 7),), **more):
        with pytest.raises(ValueError, match=message):
            model.generate(torch.tensor(ids), custom_generate=str(tiny_mtp.folder), pad_token_id=0,
                           trust_remote_code=True, max_new_tokens=5, **more)

    refused("one prompt at a time", ids=((5, 6), (7, 8)))
    refused("one prompt at a time", num_return_sequences=2, num_beams=2)
    refused("without padding", attention_mask=torch.tensor([[0, 1, 1]]))
    refused("k=9: this model was trained for 1 to 8", k=9)
    refused("k=0: this model was trained for 1 to 8", k=0)
    refused("do_sample", do_sample=True)
    refused("treshold", treshold=0.9)                               # transformers' own check
    plain = AutoModelForCausalLM.from_pretrained(resolve("tiny"), dtype=torch.float32)
    refused("not trained with mask tokens", plain)
    both_ways = write_random(drafter, tmp_path / "both", bidirectional=True)
    refused("both ways", AutoModelForCausalLM.from_pretrained(both_ways, dtype=torch.float32))
    with pytest.raises(ValueError, match="trust_remote_code"):      # not run unless it is trusted
        tiny_mtp.theirs.generate(torch.tensor([[5]]), custom_generate=str(tiny_mtp.folder),
                                 trust_remote_code=False)


def test_folders_have_it(tiny, tmp_path, any_case):
    """Those of train.py and the one in checkpoints/; not one without a mask token."""
    written = (any_case.folder / "custom_generate" / "generate.py").read_bytes()
    assert written == SOURCE.read_bytes()
    save_pretrained(Transformer.from_pretrained(tiny), tmp_path)
    assert not (tmp_path / "custom_generate").exists()


def test_other_engines_find_the_mask_token(brief_case, tiny_mtp):
    """`pard_token` in config.json: vLLM and TensorRT-LLM then draft with the folder."""
    for some in (brief_case, tiny_mtp):
        config = read_json(some.folder / "config.json")
        assert config["pard_token"] == config["nanomtp"]["mask_token_id"] < config["vocab_size"]


def test_adapters_leave_text_alone(adapters_case, tiny):
    """Before and after they are attached: the start model's logits, to the last bit. At mask tokens
    they do something, and a threshold keeps more than one token of a pass."""
    from transformers import AutoModelForCausalLM

    start = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    chunks = set()
    for prompt in adapters_case.prompts:
        adapters_case.generate(prompt, (3, None, False), max_new_tokens=6)
        chunks |= set(adapters_case.expected(prompt, (3, 0.05, False), 25).chunks)
        ids = torch.tensor([prompt])
        with torch.no_grad():
            assert torch.equal(adapters_case.theirs(ids).logits, start(ids).logits)
    assert max(chunks) > 1


def test_it_stands_alone():
    assert imported(SOURCE.relative_to(ROOT)) == {
        "functools", "safetensors", "torch", "transformers"}


def test_defaults_are_those_of_sample():
    assert choose_strategy(None, None, 8) == Strategy(8, 0.9)       # what CALLS compares with
    assert choose_strategy(None, None, 8, "narrow") == Strategy(8, None, "narrow")
