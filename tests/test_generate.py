"""
`generate` against slow references: transformers' greedy decoding for k = 1, an uncached loop for everything else; and the
edges that users of such loops ask about: stop tokens and limits in the middle of a chunk, ragged batches, stop strings.
"""
import copy
import json
import random

import pytest
import torch
from conftest import TINY_VOCAB, tiny_checkpoint

import sample
from extras.report import chunks_of, shared_prefix, speeds, summary
from model import KVCache, Transformer, add_mask_token, save_pretrained
from pretrained import InputError
from sample import accept, cut, generate, strategy, strategy_name
from tokenizer import Tokenizer

MASK = TINY_VOCAB


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random model with a mask token. Its drafts are mostly wrong and its confidences spread over 0.1 .. 1."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("generate") / "checkpoint", seed=3, max_position_embeddings=96)
    model = Transformer.from_pretrained(folder).eval()
    add_mask_token(model, MASK)
    return model


@pytest.fixture(scope="module")
def willing(model):
    """The same model, made to repeat itself: what its masks predict is then often what it goes on with."""
    willing = copy.deepcopy(model)
    with torch.no_grad():
        for block in willing.model.layers:
            block.self_attn.o_proj.weight.mul_(0.5)
            block.mlp.down_proj.weight.mul_(0.5)
        table = willing.model.embed_tokens.weight
        table[MASK] = 0.0
        table[3:40] = table[3:4] + 0.3 * table[3:40]
    return willing


def random_prompts(count, seed, longest=24):
    rng = random.Random(seed)
    return [[rng.randrange(3, TINY_VOCAB) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def behind(model, text, k, bidirectional=False):
    """Logits of the k slots behind `text`, (k, candidates), from one pass over text and k-1 masks, without a cache.

    The mask is the causal one; bidirectional: but the k-1 masks see each other both ways.
    """
    n = len(text) + k - 1
    seen = torch.ones(n, n, dtype=torch.bool).tril()
    if bidirectional:
        seen[len(text):, len(text):] = True
    return model(torch.tensor([text + [MASK] * (k - 1)]), torch.arange(n)[None], seen)[0, -k:, :MASK]


@torch.no_grad()
def uncached(model, prompt, k, threshold, stop_ids, limit, bidirectional=False):
    """The method, word for word, without a cache: the whole text and k-1 masks go through the model in every pass."""
    tokens, chunks = [], []
    while True:
        logits = behind(model, prompt + tokens, k, bidirectional)
        p = logits.softmax(dim=-1)
        kept = 1
        while kept < k and (threshold is None or p[kept].max() >= threshold):
            kept += 1
        chunks.append(0)
        for token in logits[:kept].argmax(dim=-1).tolist():
            tokens.append(token)
            chunks[-1] += 1
            if token in stop_ids:
                return tokens, chunks, "stop"
            if len(tokens) == limit:
                return tokens, chunks, "length"


STRATEGIES = [(1, None), (2, None), (4, None), (4, 0.9), (4, 0.5), (3, 0.3)]


@pytest.mark.parametrize("k, threshold", STRATEGIES)
def test_cached_loop_equals_the_uncached_one(model, k, threshold):
    sizes = set()
    for seed, prompt in enumerate(random_prompts(6, seed=1)):
        stop_ids = set(range(seed * 7, seed * 7 + 5))
        result, = generate(model, [prompt], k, threshold, MASK, stop_ids, 30)
        assert (result.tokens, result.chunks, result.finish) == uncached(model, prompt, k, threshold, stop_ids, 30)
        sizes |= set(result.chunks)
    assert threshold != 0.5 or len(sizes) > 1                       # otherwise the adaptive case would test nothing


@pytest.mark.parametrize("k, threshold", STRATEGIES)
def test_ragged_batch_equals_each_prompt_alone(model, k, threshold):
    """16 prompts of 1 to 24 tokens, which stop at different passes, for different reasons: same answers in company."""
    prompts = random_prompts(16, seed=2)
    stop_ids = set(range(10, 16))
    together = generate(model, prompts, k, threshold, MASK, stop_ids, 25)
    alone = [generate(model, [prompt], k, threshold, MASK, stop_ids, 25)[0] for prompt in prompts]
    assert [(r.tokens, r.chunks, r.finish) for r in together] == [(r.tokens, r.chunks, r.finish) for r in alone]
    for a, b in zip(together, alone):
        assert a.confidences == pytest.approx(b.confidences, abs=1e-4)
    assert {r.finish for r in together} == {"stop", "length"}


def test_threshold_limits(model):
    """0 keeps everything (static k), above 1 keeps one token a pass (plain decoding)."""
    prompts = random_prompts(5, seed=3)

    def texts(k, threshold):
        return [(r.tokens, r.chunks) for r in generate(model, prompts, k, threshold, MASK, {7}, 20)]

    assert texts(4, 0.0) == texts(4, None) != texts(1, None)
    assert texts(4, 1.01) == texts(1, None)


def test_k1_equals_transformers(model, tmp_path):
    """Plain decoding of a saved multi-token checkpoint is transformers' greedy decoding of it, token for token."""
    import transformers

    tiny_checkpoint(tmp_path)                                       # for its tokenizer
    save_pretrained(model, tmp_path, {"mask_token_id": MASK, "k_max": 4})
    Tokenizer(tmp_path).save(tmp_path, MASK)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.convert_tokens_to_ids("<|mtp|>") == MASK == Tokenizer(tmp_path).mask_id
    for prompt in random_prompts(6, seed=4):
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, len(prompt):].tolist()
        result, = generate(model, [prompt], 1, None, MASK, Tokenizer(tmp_path).stop_ids, 20)
        assert result.tokens == expected


def test_mask_token_is_never_emitted(model, tmp_path):
    """Neither by us nor by transformers, even where it is the model's favourite everywhere."""
    import transformers

    loud = Transformer.from_pretrained(tiny_checkpoint(tmp_path, tied=False))
    add_mask_token(loud, MASK)
    with torch.no_grad():
        loud.model.norm.weight.fill_(1.0)
        loud.lm_head.weight.mul_(0.01)
        loud.lm_head.weight[MASK] = loud.model.embed_tokens.weight[MASK] = 3.0
        loud.model.embed_tokens.weight.fill_(3.0)                   # every state points the mask token's way
    prompt = [5, 6, 7]
    n = torch.ones(3, 3, dtype=torch.bool).tril()
    assert loud(torch.tensor([prompt]), torch.arange(3)[None], n)[0, -1].argmax() == MASK
    result, = generate(loud.eval(), [prompt], 4, None, MASK, (), 12)
    assert MASK not in result.tokens and len(result.tokens) == 12
    save_pretrained(loud, tmp_path, {"mask_token_id": MASK, "k_max": 4})
    Tokenizer(tmp_path).save(tmp_path, MASK)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert MASK not in theirs.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0].tolist()


def test_stop_token_inside_a_chunk(model):
    """Cut after the first stop token; what the pass wrote behind it is dropped and counted nowhere."""
    prompt = random_prompts(1, seed=5)[0]
    free, = generate(model, [prompt], 4, None, MASK, (), 12)
    stop = free.tokens[5]                                           # slot 2 of the second pass
    first = free.tokens.index(stop)
    result, = generate(model, [prompt], 4, None, MASK, {stop}, 12)
    assert result.tokens == free.tokens[:first + 1] and result.finish == "stop"
    assert sum(result.chunks) == len(result.tokens) == len(result.confidences) and result.chunks[-1] == first % 4 + 1
    assert result.tokens_per_forward == len(result.tokens) / len(result.chunks)


@pytest.mark.parametrize("limit", range(1, 10))
def test_limit_inside_a_chunk(model, limit):
    prompt = random_prompts(1, seed=6)[0]
    free, = generate(model, [prompt], 4, None, MASK, (), 12)
    result, = generate(model, [prompt], 4, None, MASK, {free.tokens[limit]}, limit)     # the stop comes one too late
    assert result.tokens == free.tokens[:limit] or free.tokens[limit] in free.tokens[:limit]
    assert len(result.tokens) <= limit and (result.finish == "length") == (result.tokens[-1] != free.tokens[limit])


def test_cut():
    """Stop strings that straddle chunks, with the text of a token being its number."""
    def decode(ids):
        return "".join(map(str, ids))

    assert cut([1, 2], [3, 4, 5], 10, (), ["23"], decode) == ([3], "stop string")
    assert cut([1, 2], [3, 4, 5], 10, (), ["1234"], decode) == ([3, 4], "stop string")
    assert cut([1, 2], [3, 4, 5], 10, (), ["12"], decode) == ([3, 4, 5], "")             # was there before this chunk
    assert cut([1, 2], [3, 4, 5], 10, (), ["45", "34"], decode) == ([3, 4], "stop string")
    assert cut([1, 2], [3, 4, 5], 10, {4}, ["345"], decode) == ([3, 4], "stop")
    assert cut([1, 2], [3, 4, 5], 3, {4}, (), decode) == ([3], "length")                 # the stop was never emitted
    assert cut([1, 2], [3, 4, 5], 4, {4}, (), decode) == ([3, 4], "stop")
    assert cut([1, 2], [3], 10, (), (), None) == ([3], "")


def test_stop_string_across_chunks(model):
    def decode(ids):
        return "".join(f"<{i}>" for i in ids)

    prompt = random_prompts(1, seed=7)[0]
    free, = generate(model, [prompt], 3, None, MASK, (), 12)
    stop = decode(free.tokens[2:4])[2:-1]                           # from inside the first chunk into the second
    result, = generate(model, [prompt], 3, None, MASK, (), 12, [stop], decode)
    assert result.tokens == free.tokens[:4] and result.finish == "stop string" and result.chunks == [3, 1]


def test_accept():
    confidence = torch.tensor([[0.1, 0.9, 0.9, 0.2], [0.1, 0.2, 0.9, 0.9], [0.9, 0.95, 0.91, 0.9]])
    assert accept(confidence, 0.9).tolist() == [3, 1, 4]
    assert accept(confidence, None).tolist() == [4, 4, 4] == accept(confidence, 0.0).tolist()
    assert accept(confidence, 1.5).tolist() == [1, 1, 1]
    assert accept(confidence[:, :1], 0.9).tolist() == [1, 1, 1]


def test_context_length(model):
    """Positions end at 96 in this model: longer prompts are refused, shorter ones stop there."""
    with pytest.raises(InputError, match="96"):
        generate(model, [[5] * 96], 4, None, MASK, (), 10)
    with pytest.raises(InputError, match="0 tokens"):
        generate(model, [[]], 4, None, MASK, (), 10)
    short, long = generate(model, [[5] * 3, [5] * 90], 4, None, MASK, (), 20)
    assert (len(short.tokens), len(long.tokens), long.finish) == (20, 6, "length")
    assert generate(model, [], 4, None, MASK) == []


def test_k_needs_a_mask_token(model):
    with pytest.raises(InputError, match="no mask token"):
        generate(model, [[5]], 2, None, None)


def test_chunks_as_they_come(model):
    """on_chunk is called with every row's new tokens, in order, and nothing else."""
    prompts, seen = random_prompts(4, seed=8), {}
    results = generate(model, prompts, 3, 0.5, MASK, {9, 10}, 15,
                       on_chunk=lambda row, new: seen.setdefault(row, []).append(list(new)))
    assert [seen[row] for row in range(4)] == [chunks_of(result) for result in results]


def test_speeds_and_summary(model):
    batch = generate(model, random_prompts(3, seed=9), 3, None, MASK, (), 9)
    total, first = sum(len(r.tokens) for r in batch), sum(r.chunks[0] for r in batch)
    seconds, prompt_seconds = max(r.seconds for r in batch), batch[0].prompt_seconds
    assert 0 < prompt_seconds < seconds
    assert speeds([batch]) == pytest.approx((total / seconds, (total - first) / (seconds - prompt_seconds)))
    text = summary([batch])
    assert "27 tokens in 9 passes: 3.00 +- 0.00" in text and "3 x 9" in text and "length x 3" in text
    one = summary([generate(model, [[5, 6]], 1, None, MASK, (), 1)])            # no pass behind the prompt's: no such speed
    assert "prompt pass included\n" in one and "nan" not in one
    assert shared_prefix([1, 2, 3], [1, 2, 4]) == 2 and shared_prefix([1], [1, 2]) == 1 == shared_prefix([1, 2], [1])


def test_strategy():
    assert strategy(None, None, 4) == (4, 0.9) and strategy(3, None, 4) == (3, None)
    assert strategy(None, 0.5, 4) == (4, 0.5) and strategy(2, 0.5, 4) == (2, 0.5) and strategy(1, None, 1) == (1, None)
    assert strategy(None, None, 4, "wide") == (4, None) and strategy(None, 0.5, 4, "wide") == (4, 0.5)
    assert [strategy_name(*way) for way in ((1, 0.9), (3, None), (4, 0.95), (4, None, "wide"), (4, 0.5, "narrow"))] == [
        "static 1", "static 3", "adaptive 0.95", "lossless 4", "lossless 4 narrow at 0.5"]
    for k in (0, 5):
        with pytest.raises(InputError, match="1 to 4"):
            strategy(k, None, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_model_decodes_as_transformers_does(smollm2, dtype):
    """SmolLM2, several chat prompts at once: in fp32 the greedy text of transformers, token for token; bf16 just runs."""
    import transformers

    tokenizer, ours = Tokenizer(smollm2), Transformer.from_pretrained(smollm2, dtype).eval()
    questions = ["What is 7 + 5?", "Name three rivers in Europe.", "Tom has 3 boxes of 12 eggs. How many eggs is that?"]
    prompts = [tokenizer.prompt(question, "chat") for question in questions]
    results = generate(ours, prompts, 1, None, None, tokenizer.stop_ids, 24)
    assert all(0 < len(result.tokens) <= 24 for result in results)
    if dtype == torch.float32:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=dtype)
        for prompt, result in zip(prompts, results):
            expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
            assert result.tokens == expected[0, len(prompt):].tolist()


def test_real_model_decodes_losslessly(smollm2):
    """SmolLM2 with an untrained mask token: drafts that are mostly wrong change nothing, in neither form."""
    tokenizer, ours = Tokenizer(smollm2), Transformer.from_pretrained(smollm2).eval()
    add_mask_token(ours, tokenizer.free_id)
    ours.fuse()
    prompts = [tokenizer.prompt(question, "chat") for question in ("What is 7 + 5?", "Name three rivers in Europe.")]
    settings = (tokenizer.free_id, tokenizer.stop_ids, 16)
    plain = [result.tokens for result in generate(ours, prompts, 1, None, *settings)]
    for form in ("wide", "narrow"):
        assert [result.tokens for result in generate(ours, prompts, 3, None, *settings, lossless=form)] == plain


def test_generation_config_of_a_saved_checkpoint(tmp_path):
    """What other programs need to know: never emit the mask, stop where the tokenizer's owner stops."""
    tiny_checkpoint(tmp_path / "a")
    (tmp_path / "b").mkdir()
    Tokenizer(tmp_path / "a").save(tmp_path / "b", MASK)
    saved = json.loads((tmp_path / "b" / "generation_config.json").read_text())
    assert saved["suppress_tokens"] == [MASK] and saved["eos_token_id"] == 2


# --- lossless decoding

LOSSLESS = [(k, threshold, form) for k, threshold in ((2, None), (4, None), (4, 0.05)) for form in ("wide", "narrow")]


@torch.no_grad()
def uncached_lossless(model, prompt, k, threshold, form, stop_ids, limit, bidirectional=False):
    """Drafts are checked one by one with plain passes over the whole text, as if they cost nothing."""
    def slots(text):
        """Candidates and probabilities of the k slots behind `text`."""
        logits = behind(model, text, k, bidirectional)
        return logits.argmax(dim=-1).tolist(), logits.softmax(dim=-1).max(dim=-1).values.tolist()

    tokens, chunks, drafts = [], [], []
    while True:
        new = []                                                    # one ordinary prediction, and one more for each
        while not new or drafts and drafts.pop(0) == new[-1]:       # draft that it confirms
            candidates, p = slots(prompt + tokens + new)
            new.append(candidates[0])
            all_stood = not drafts
        count = 1
        while count < k and (threshold is None or p[count] >= threshold):
            count += 1
        drafts = candidates[1:count] if form == "wide" or all_stood else []
        chunks.append(0)
        for token in new:
            tokens.append(token)
            chunks[-1] += 1
            if token in stop_ids:
                return tokens, chunks, "stop"
            if len(tokens) == limit:
                return tokens, chunks, "length"


@pytest.mark.parametrize("k, threshold, form", LOSSLESS)
def test_lossless_passes_against_the_slow_reference(willing, k, threshold, form):
    """Not only the text: the same tokens in each pass, with a model whose drafts are sometimes right."""
    sizes, rejected = set(), 0
    for prompt in random_prompts(6, seed=1):
        result, = generate(willing, [prompt], k, threshold, MASK, {11, 12}, 30, lossless=form)
        assert (result.tokens, result.chunks, result.finish) == uncached_lossless(
            willing, prompt, k, threshold, form, {11, 12}, 30)
        sizes |= set(result.chunks)
        rejected += sum(stood < fed for fed, stood in result.drafts)
    assert sizes >= {1, 2} and rejected and max(sizes) <= k


@pytest.mark.parametrize("k, threshold, form", LOSSLESS)
def test_lossless_text_is_greedy_text(model, k, threshold, form):
    """Token for token, in a batch of ragged prompts that end at different passes; drafts are mostly wrong here."""
    prompts, stop_ids = random_prompts(16, seed=4), set(range(10, 14))
    plain = generate(model, prompts, 1, None, MASK, stop_ids, 25)
    together = generate(model, prompts, k, threshold, MASK, stop_ids, 25, lossless=form)
    assert [(r.tokens, r.finish) for r in together] == [(r.tokens, r.finish) for r in plain]
    for a, b in zip(together, plain):
        assert a.confidences == pytest.approx(b.confidences, abs=1e-4)
    alone = [generate(model, [prompt], k, threshold, MASK, stop_ids, 25, lossless=form)[0] for prompt in prompts]
    assert [(r.tokens, r.chunks, r.drafts) for r in together] == [(r.tokens, r.chunks, r.drafts) for r in alone]
    assert {r.finish for r in together} == {"stop", "length"}


@pytest.mark.parametrize("form", ["wide", "narrow"])
def test_rejected_drafts_leave_no_trace(willing, form, monkeypatch):
    """The committed part of the cache is that of the plain model on prompt + answer, whatever was drafted in between."""
    caches = []
    monkeypatch.setattr(sample, "KVCache", lambda *args: caches.append(KVCache(*args)) or caches[-1])
    monkeypatch.setattr(KVCache, "keep_rows", lambda cache, rows: None)             # the last state stays to be looked at
    prompt = random_prompts(1, seed=5)[0]
    result, = generate(willing, [prompt], 4, None, MASK, (), 30, lossless=form)
    assert any(stood < fed for fed, stood in result.drafts)
    used, length = caches[0], int(caches[0].length[0])
    assert len(prompt) < length < len(prompt) + 30
    text = (prompt + result.tokens)[:length]
    fresh = KVCache(willing.config, 1, length, torch.device("cpu"), torch.float32)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    with torch.no_grad():
        willing(torch.tensor([text]), torch.arange(length)[None], causal, fresh)
    for ours, theirs in zip(used.keys + used.values, fresh.keys + fresh.values):
        torch.testing.assert_close(ours[:, :length], theirs, rtol=0, atol=1e-5)


def test_verify():
    """A wrong draft ends the run, right ones behind it notwithstanding; a short row's masks are no drafts."""
    ids = torch.tensor([[5, 6, 7, 8, MASK, MASK], [5, 6, 7, MASK, MASK, MASK], [5, MASK, MASK, MASK, MASK, MASK]])
    candidates = torch.tensor([[6, 0, 8, 9, 0, 0], [6, 7, 1, 0, 0, 0], [MASK, MASK, 1, 0, 0, 0]])
    stood, chosen = sample.verify(candidates, ids, torch.tensor([4, 3, 1]), 4, k=3, wide=False)
    assert stood.tolist() == [1, 2, 0] and chosen.tolist() == [[1, 4, 5], [2, 3, 4], [0, 1, 2]]
    stood, chosen = sample.verify(candidates, ids, torch.tensor([4, 3, 1]), 4, k=3, wide=True)
    assert chosen.tolist() == [[1, 6, 7], [2, 8, 9], [0, 4, 5]]


# --- bidirectional regions

@pytest.mark.parametrize("k, threshold", [(2, None), (4, None), (4, 0.3), (4, 0.15)])
def test_bidirectional_against_the_uncached_loop(model, k, threshold):
    """Masks that see each other: one prompt at a time, and all in one batch, where rows with fewer pending tokens than
    others get fillers behind their masks, which these must not see."""
    prompts, stop_ids = random_prompts(9, seed=1), set(range(10, 16))
    expected = [uncached(model, prompt, k, threshold, stop_ids, 25, bidirectional=True) for prompt in prompts]
    alone = [generate(model, [prompt], k, threshold, MASK, stop_ids, 25, bidirectional=True)[0] for prompt in prompts]
    assert [(r.tokens, r.chunks, r.finish) for r in alone] == expected
    for fixed in (False, True):
        together = generate(model, prompts, k, threshold, MASK, stop_ids, 25, bidirectional=True, fixed=fixed)
        assert [(r.tokens, r.chunks, r.finish) for r in together] == expected
        for a, b in zip(together, alone):
            assert a.confidences == pytest.approx(b.confidences, abs=1e-4)
    causal = [r.tokens for r in generate(model, prompts, k, threshold, MASK, stop_ids, 25, bidirectional=False)]
    assert k == 2 or causal != [tokens for tokens, _, _ in expected]    # a single mask has none to see
    assert threshold is None or any(len(set(chunks[:-1])) > 1 for _, chunks, _ in expected)


@pytest.mark.parametrize("k, threshold, form", LOSSLESS)
def test_bidirectional_lossless(willing, k, threshold, form):
    """The text of k = 1, in the passes of the slow reference; in a batch, as alone, and with fixed shapes."""
    prompts, stop_ids, sizes, drafts = random_prompts(10, seed=2), {11, 12}, set(), {}
    plain = [(r.tokens, r.finish) for r in generate(willing, prompts, 1, None, MASK, stop_ids, 25)]
    expected = [uncached_lossless(willing, prompt, k, threshold, form, stop_ids, 25, True) for prompt in prompts]
    settings = (prompts, k, threshold, MASK, stop_ids, 25)
    for fixed in (False, True):
        together = generate(willing, *settings, lossless=form, bidirectional=True, fixed=fixed)
        assert [(r.tokens, r.finish) for r in together] == plain
        assert [(r.tokens, r.chunks, r.finish) for r in together] == expected
        sizes |= {size for r in together for size in r.chunks}
    assert sizes >= {1, 2} and max(sizes) <= k
    for bidirectional in (False, True):
        results = generate(willing, *settings, lossless=form, bidirectional=bidirectional)
        drafts[bidirectional] = [r.drafts for r in results]
    assert k == 2 or drafts[False] != drafts[True]                      # other drafts, the same text


def test_bidirectional_by_the_checkpoints_record(model, tmp_path):
    """What train.py wrote into config.json decides, unless the caller does; without a record, regions are causal."""
    prompts, texts = random_prompts(6, seed=3), {}
    for recorded in (None, False, True):
        folder = tiny_checkpoint(tmp_path / str(recorded))
        record = {"mask_token_id": MASK, "k_max": 4} | ({} if recorded is None else {"bidirectional": recorded})
        save_pretrained(model, folder, record)
        loaded = Transformer.from_pretrained(folder).eval()
        texts[recorded], causal, both = ([r.tokens for r in generate(loaded, prompts, 4, None, MASK, (), 20, **more)]
                                         for more in ({}, {"bidirectional": False}, {"bidirectional": True}))
        assert causal != both and texts[recorded] == (both if recorded else causal)
    assert texts[None] == texts[False] != texts[True]


# --- sampling

def test_sampling_is_seeded_and_leaves_long_chunks_alone(willing):
    prompts = random_prompts(8, seed=6)

    def texts(**settings):
        return [r.tokens for r in generate(willing, prompts, 3, 0.5, MASK, (), 20, **settings)]

    assert texts(temperature=1.0, seed=1) == texts(temperature=1.0, seed=1) != texts(temperature=1.0, seed=2)
    assert texts(temperature=1.0, top_k=1) == texts() == texts(temperature=1.0, top_p=1e-9) == texts(temperature=1e-6)
    alone = [generate(willing, [prompt], 3, 0.5, MASK, (), 20, temperature=1.0, seed=1)[0].tokens for prompt in prompts[:1]]
    assert alone == texts(temperature=1.0, seed=1)[:1]              # a row's draws are its own
    static = [r.tokens for r in generate(willing, prompts, 3, None, MASK, (), 20, temperature=1.0)]
    assert static == [r.tokens for r in generate(willing, prompts, 3, None, MASK, (), 20)]      # every chunk has 3 tokens
    with pytest.raises(InputError, match="lossless"):
        generate(willing, prompts, 3, None, MASK, (), 20, temperature=1.0, lossless="wide")


def test_draw_follows_the_distribution():
    logits, generator = torch.tensor([0.0, 1.0, 2.0, -1.0]), torch.Generator().manual_seed(0)

    def share(**settings):
        drawn = [sample.draw(logits, **{"temperature": 1.0, "top_k": 0, "top_p": 1.0} | settings, generator=generator)
                 for _ in range(3000)]
        return [drawn.count(i) / 3000 for i in range(4)]

    assert share() == pytest.approx(logits.softmax(-1).tolist(), abs=0.03)
    assert share(temperature=2.0) == pytest.approx((logits / 2).softmax(-1).tolist(), abs=0.03)
    two = (logits[1:3]).softmax(-1).tolist()
    assert share(top_k=2) == pytest.approx([0, *two, 0], abs=0.03) == share(top_p=0.8)  # 0.64 alone is less than 0.8
    assert share(top_p=0.6) == [0, 0, 1, 0]


# --- fixed shapes

@pytest.mark.parametrize("k, threshold, lossless", [(1, None, None), (3, None, None), (3, 0.4, None), (3, None, "wide"),
                                                    (3, None, "narrow")])
def test_fixed_shapes_change_no_text(willing, k, threshold, lossless, monkeypatch):
    """Ragged prompts that end at different passes; every pass but the first has one shape, so one is compiled."""
    prompts, shapes, forward = random_prompts(9, seed=7), [], Transformer.forward

    def spy(model, ids, positions, mask, *rest, **more):
        shapes.append((ids.shape, mask.shape))
        return forward(model, ids, positions, mask, *rest, **more)

    free = generate(willing, prompts[:4], k, threshold, MASK, (), 25, lossless=lossless)
    stops = {result.tokens[5 + 3 * i] for i, result in enumerate(free)}
    expected = generate(willing, prompts, k, threshold, MASK, stops, 25, lossless=lossless)
    monkeypatch.setattr(Transformer, "forward", spy)
    fixed = generate(willing, prompts, k, threshold, MASK, stops, 25, lossless=lossless, fixed=True)
    assert [(r.tokens, r.chunks, r.finish, r.drafts) for r in fixed] == [
        (r.tokens, r.chunks, r.finish, r.drafts) for r in expected]
    assert len(set(shapes[1:])) == 1 < len(shapes) and {r.finish for r in fixed} == {"stop", "length"}
