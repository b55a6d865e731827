"""
speculate.py against slow references: its layout and its verification one element at a time, its
passes by a loop that checks each draft with a plain pass of its own. And what it is for: the text
of k = 1.
"""
import copy
import itertools
import random

import pytest
import torch
from conftest import TINY_VOCAB, random_prompts, tokens, write_chunk
from test_sample import behind, outcome, sure_ones

import speculate as speculation
from common.tokenizer import Tokenizer
from model import KVCache, Transformer, add_mask_token
from sample import Strategy, generate
from speculate import decode, lay_out, speculate, verify

MASK = TINY_VOCAB


@pytest.fixture(scope="module")
def willing(drafter):
    """A model with eight words for almost everything, so its drafts are right now and then."""
    willing = copy.deepcopy(drafter)
    with torch.no_grad():
        willing.model.embed_tokens.weight[10:18] *= 3
        willing.model.embed_tokens.weight[MASK] = 0
    return willing


# --------------------------------------------------------------------------------------------------
# The parts

@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("k, committed, n_text, anchors, W", [
    (3, [0, 0], [7, 4], [[6], [3]], 7),                             # the first pass, ragged prompts
    (3, [9, 4, 6], [3, 1, 2], [[0, 1, 2]] * 3, 3),                  # wide; rows with fewer drafts
    (4, [5, 8], [4, 2], [[3], [1]], 4),                             # narrow
    (1, [3, 0], [1, 1], [[0], [0]], 1),                             # no mask tokens at all
])
def test_lay_out_one_element_at_a_time(k, committed, n_text, anchors, W, bidirectional):
    R = len(anchors[0])
    T = W + R * (k - 1)
    positions, mask = lay_out(torch.tensor(committed), torch.tensor(n_text), torch.tensor(anchors),
                              W, k, bidirectional)
    assert mask.shape == (len(anchors), T, max(committed) + T) and mask.dtype == torch.bool
    for b, length in enumerate(committed):
        # what was fed: (region or None, its last text token, tokens behind that)
        fed = [(None, i, 0) for i in range(W)]
        fed += [(r, anchors[b][r], j) for r in range(R) for j in range(1, k)]
        assert positions[b].tolist() == [length + last + j for _, last, j in fed]
        for (q, (q_region, q_last, q_step)), place in itertools.product(
                enumerate(fed), range(mask.shape[2])):
            if place < length:
                expected = True                                     # committed text
            elif place >= length + T:
                expected = False                                    # another row's room
            else:
                region, last, step = fed[place - length]
                if region is None:
                    expected = last <= q_last and last < n_text[b]
                else:
                    expected = region == q_region and (bidirectional or step <= q_step)
            assert mask[b, q, place] == expected, (b, q, place)


def test_verify_one_element_at_a_time():
    """A wrong draft ends the run, right ones behind it notwithstanding; a short row has no more."""
    drafts = torch.tensor([[6, 7, 8], [6, 7, 0], [0, 0, 0], [6, 7, 8]])
    predicted = torch.tensor([[6, 0, 8, 9], [6, 7, 0, 1], [0, 0, 0, 1], [6, 7, 8, 9]])
    assert verify(drafts, torch.tensor([3, 2, 0, 3]), predicted).tolist() == [1, 2, 0, 3]
    assert verify(drafts[:, :0], torch.zeros(4), predicted[:, :1]).tolist() == [0, 0, 0, 0]
    rng, seen = random.Random(0), set()
    for _ in range(200):
        n = rng.randint(0, 4)
        drafts, predicted = ([rng.randrange(2) for _ in range(size)] for size in (4, 5))
        expected = 0
        while expected < n and drafts[expected] == predicted[expected]:
            expected += 1
        stood, = verify(torch.tensor([drafts]), torch.tensor([n]), torch.tensor([predicted]))
        assert stood == expected
        seen.add((n, expected))
    assert len(seen) == 15                                          # every count of every length


def test_decode_takes_a_strategy_to_its_loop(willing):
    prompts, ending = random_prompts(3, seed=3), {"max_new_tokens": 12}
    everything = (willing, tokens(MASK), prompts)
    for strategy, loop, more in (
            (Strategy(3, 0.6), generate, {}), (Strategy(3, 0.6, "wide"), speculate, {}),
            (Strategy(3, 0.6, "narrow"), speculate, {"narrow": True})):
        ours = decode(*everything, strategy, **ending)
        reference = loop(*everything, 3, 0.6, **more, **ending)
        assert outcome(ours) == outcome(reference)
        assert [a.drafts for a in ours] == [a.drafts for a in reference]
        assert any(a.drafts for a in ours) == (strategy.lossless is not None)


# --------------------------------------------------------------------------------------------------
# The loop

LOSSLESS = [(k, threshold, form) for k, threshold in ((2, None), (4, None), (4, 0.6))
            for form in ("wide", "narrow")]


@torch.no_grad()
def uncached(model, prompt, k, threshold, form, stop_ids, limit, bidirectional):
    """Drafts are checked one by one with plain passes over the whole text, as if they were free."""
    written, chunks, drafts = [], [], []
    while True:
        new = []
        while not new or drafts and drafts.pop(0) == new[-1]:
            # an ordinary prediction, and one more for each draft that it confirms
            logits = behind(model, prompt + written + new, k, bidirectional)
            new.append(logits[0].argmax().item())
            all_stood = not drafts
        p = logits.softmax(dim=-1).max(dim=-1).values.tolist()
        drafts = logits.argmax(dim=-1).tolist()[1:sure_ones(p, threshold)]
        if form == "narrow" and not all_stood:          # its mask tokens stood behind a wrong draft
            drafts = []
        finish = write_chunk(new, written, chunks, stop_ids, limit)
        if finish:
            return written, chunks, finish


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("k, threshold, form", LOSSLESS)
def test_passes_of_the_slow_reference(willing, monkeypatch, k, threshold, form, bidirectional):
    """Not only the text: the same tokens in each pass, with a model whose drafts may be right.

    A ragged batch, whose rows end at different passes.
    """
    prompts, stop_ids = random_prompts(10, seed=2), {13}
    ending = (tokens(MASK, stop_ids), prompts, k, threshold, form == "narrow", 25)
    causal = [result.drafts for result in speculate(willing, *ending)]
    monkeypatch.setitem(willing.config.raw, "nanomtp", {"bidirectional": bidirectional})
    results = speculate(willing, *ending)
    assert outcome(results) == [
        uncached(willing, prompt, k, threshold, form, stop_ids, 25, bidirectional)
        for prompt in prompts]
    stood = {stood for result in results for fed, stood in result.drafts if fed == k - 1}
    assert stood >= {0, 1, k - 1}                                   # else it would test little
    if bidirectional and k > 2:                                     # other drafts, the same text
        assert [result.drafts for result in results] != causal


@pytest.mark.parametrize("k, threshold, form", [(1, None, "wide"), *LOSSLESS])
def test_text_is_that_of_k_1(drafter, k, threshold, form):
    """In a ragged batch, whatever ends its rows; drafts are mostly wrong here."""
    prompts, stand_in = random_prompts(16, seed=4), tokens(MASK, range(10, 14))
    free = generate(drafter, stand_in, prompts, max_new_tokens=25)
    across = stand_in.token_bytes(free[0].tokens[4:6])[1:-1].decode()
    ending = {"max_new_tokens": 25, "stop_strings": [across]}
    plain = generate(drafter, stand_in, prompts, **ending)
    assert {result.finish for result in plain} == {"stop", "stop string", "length"}
    strategy = Strategy(k, threshold, form)
    together = decode(drafter, stand_in, prompts, strategy, **ending)
    for a, b in zip(together, plain):
        assert (a.tokens, a.finish) == (b.tokens, b.finish)
        assert a.confidences == pytest.approx(b.confidences, abs=1e-4)
    alone = [decode(drafter, stand_in, [prompt], strategy, **ending)[0] for prompt in prompts]
    assert outcome(together) == outcome(alone)
    assert [result.drafts for result in together] == [result.drafts for result in alone]


@pytest.mark.parametrize("narrow", [False, True])
def test_rejected_drafts_leave_no_trace(willing, narrow, monkeypatch):
    """The committed part of the cache is the plain model's, whatever was drafted in between."""
    caches = []

    def spy(*args):
        caches.append(KVCache(*args))
        return caches[-1]

    monkeypatch.setattr(speculation, "KVCache", spy)
    monkeypatch.setattr(KVCache, "keep_rows", lambda cache, rows: None)     # it is still looked at
    prompt, = random_prompts(1, seed=5)
    result, = speculate(willing, tokens(MASK), [prompt], 4, narrow=narrow, max_new_tokens=30)
    assert any(stood < fed for fed, stood in result.drafts)
    used, length = caches[0], int(caches[0].length[0])
    assert len(prompt) < length < len(prompt) + 30
    ids = torch.tensor([(prompt + result.tokens)[:length]])
    fresh, causal = KVCache(willing, 1, length), torch.ones(length, length, dtype=torch.bool).tril()
    with torch.no_grad():
        willing(ids, torch.arange(length)[None], causal, fresh)
    for ours, theirs in zip(used.keys + used.values, fresh.keys + fresh.values):
        torch.testing.assert_close(ours[:, :length], theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("strategy", [
    Strategy(1), Strategy(3), Strategy(3, 0.5), Strategy(3, None, "wide"),
    Strategy(3, None, "narrow")], ids=lambda strategy: strategy.name)
def test_bf16_runs(drafter, strategy):
    """The dtype of GPUs: its near-ties need not fall alike, so there is no text to compare."""
    model = copy.deepcopy(drafter).bfloat16().fuse()
    results = decode(model, tokens(MASK), random_prompts(3, seed=1), strategy, max_new_tokens=10)
    assert [len(result.tokens) for result in results] == [10] * 3
    assert all(0 < p <= 1 for result in results for p in result.confidences)


def test_real_model_decodes_losslessly(smollm2):
    """SmolLM2 with an untrained mask token: drafts that are mostly wrong change nothing."""
    tokenizer, model = Tokenizer(smollm2), Transformer.from_pretrained(smollm2).eval()
    tokenizer.add_mask_token()
    add_mask_token(model, tokenizer.mask_id)
    model.fuse()
    prompts = [tokenizer.prompt(question, "chat")
               for question in ("What is 7 + 5?", "Name three rivers in Europe.")]
    plain, *lossless = (
        decode(model, tokenizer, prompts, strategy, max_new_tokens=12)
        for strategy in (Strategy(1), Strategy(3, None, "wide"), Strategy(3, None, "narrow")))
    for results in lossless:
        assert [r.tokens for r in results] == [r.tokens for r in plain]
