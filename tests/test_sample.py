"""
sample.py against slow references: transformers' greedy decoding for k = 1, an uncached loop for
everything else. And the edges that users of such loops ask about: stop tokens and limits in the
middle of a chunk, ragged batches, stop strings.
"""
import functools

import pytest
import torch
from conftest import TINY_VOCAB, random_prompts, tiny_checkpoint, tokens, write_chunk

from common.answers import Answers
from common.cli import InputError
from common.report import chunks_of, shared_prefix, speeds, summary
from common.tokenizer import Tokenizer
from model import Transformer, add_mask_token, save_pretrained
from sample import Strategy, accept, choose_strategy, draw, generate
from speculate import decode

MASK = TINY_VOCAB


def behind(model, text, k, bidirectional=False):
    """Logits of the k slots behind `text`, (k, candidates): one pass over it and k - 1 mask tokens.

    There is no cache. Attention is causal; bidirectional: but the mask tokens see each other.
    """
    n = len(text) + k - 1
    seen = torch.ones(n, n, dtype=torch.bool).tril()
    if bidirectional:
        seen[len(text):, len(text):] = True
    ids = torch.tensor([text + [MASK] * (k - 1)])
    return model(ids, torch.arange(n)[None], seen)[0, -k:, :MASK]


def sure_ones(p, threshold):
    """ConfAdapt as the paper has it: the greatest k' with p_j > threshold for all j = 1 .. k'; 1
    where there is none. Without a threshold: all."""
    lengths = range(1, len(p) + 1)
    if threshold is None:
        return len(p)
    return max((n for n in lengths if all(p[j - 1] > threshold for j in range(1, n + 1))),
               default=1)


@torch.no_grad()
def uncached(model, prompt, k, threshold, stop_ids, limit, bidirectional=False):
    """The method, word for word: every pass reads the whole text and k - 1 mask tokens."""
    written, chunks = [], []
    while True:
        logits = behind(model, prompt + written, k, bidirectional)
        p = logits.softmax(dim=-1).max(dim=-1).values.tolist()
        kept = logits[:sure_ones(p, threshold)].argmax(dim=-1).tolist()
        finish = write_chunk(kept, written, chunks, stop_ids, limit)
        if finish:
            return written, chunks, finish


def outcome(results):
    return [(result.tokens, result.chunks, result.finish) for result in results]


# --------------------------------------------------------------------------------------------------
# The loop

STRATEGIES = [(1, None), (2, None), (4, None), (4, 0.9), (4, 0.5), (3, 0.3)]


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("k, threshold", STRATEGIES)
def test_cached_loop_equals_the_uncached_one(drafter, monkeypatch, k, threshold, bidirectional):
    """Each prompt alone, and all in a ragged batch, whose rows end at different passes.

    A row with fewer pending tokens than others gets fillers behind its mask tokens, which these
    must not see even where they see each other.
    """
    monkeypatch.setitem(drafter.config.raw, "nanomtp", {"bidirectional": bidirectional})
    prompts, stop_ids = random_prompts(12, seed=2), set(range(10, 16))
    expected = [uncached(drafter, prompt, k, threshold, stop_ids, 25, bidirectional)
                for prompt in prompts]
    ending = (tokens(MASK, stop_ids), prompts, k, threshold, 25)
    together = generate(drafter, *ending)
    alone = [generate(drafter, ending[0], [prompt], *ending[2:])[0] for prompt in prompts]
    assert outcome(together) == outcome(alone) == expected
    for a, b in zip(together, alone):
        assert a.confidences == pytest.approx(b.confidences, abs=1e-4)
    assert {result.finish for result in together} == {"stop", "length"}
    sizes = {size for result in together for size in result.chunks[:-1]}
    assert len(sizes) > 1 or threshold is None          # else the adaptive case would test nothing
    if bidirectional and k > 2:                         # a single mask token has no other to see
        monkeypatch.setitem(drafter.config.raw, "nanomtp", {})
        assert outcome(generate(drafter, *ending)) != expected


def test_k1_equals_transformers(drafter, tmp_path):
    """Plain decoding of a saved multi-token checkpoint is transformers' greedy decoding of it."""
    import transformers

    tokenizer = Tokenizer(tiny_checkpoint(tmp_path))
    tokenizer.add_mask_token()
    save_pretrained(drafter, tmp_path)
    tokenizer.save(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert theirs.generation_config.suppress_tokens == [MASK] == [Tokenizer(tmp_path).mask_id]
    for prompt in random_prompts(6, seed=4):
        text = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0]
        result, = generate(drafter, tokenizer, [prompt], max_new_tokens=20)
        assert result.tokens == text[len(prompt):].tolist()


def test_mask_token_is_never_emitted(tmp_path):
    """Neither by us nor by transformers, even where it is the model's favourite everywhere."""
    import transformers

    loud = Transformer.from_pretrained(tiny_checkpoint(tmp_path, tied=False)).eval()
    tokenizer = Tokenizer(tmp_path)
    tokenizer.add_mask_token()
    add_mask_token(loud, MASK)
    with torch.no_grad():
        loud.model.norm.weight.fill_(1.0)
        loud.lm_head.weight.mul_(0.01)
        loud.lm_head.weight[MASK] = 3.0
        loud.model.embed_tokens.weight.fill_(3.0)       # every state points the mask token's way
        ids, causal = torch.tensor([[5, 6, 7]]), torch.ones(3, 3, dtype=torch.bool).tril()
        assert loud(ids, torch.arange(3)[None], causal)[0, -1].argmax() == MASK
    for strategy in (Strategy(1), Strategy(4), Strategy(4, None, "wide")):
        result, = decode(loud, tokens(MASK), [[5, 6, 7]], strategy, max_new_tokens=12)
        assert MASK not in result.tokens and len(result.tokens) == 12
    save_pretrained(loud, tmp_path)
    tokenizer.save(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    text = theirs.generate(ids, max_new_tokens=6, do_sample=False)[0]
    assert MASK not in text.tolist()


def test_context_length(drafter):
    """Positions end at 96 in this model: longer prompts are refused, shorter ones stop there."""
    for prompt, words in (([5] * 96, "96"), ([], "0 tokens")):
        with pytest.raises(InputError, match=words):
            generate(drafter, tokens(MASK), [prompt], 4)
    short, long = generate(drafter, tokens(MASK), [[5] * 3, [5] * 90], 4, max_new_tokens=20)
    assert (len(short.tokens), len(long.tokens), long.finish) == (20, 6, "length")
    assert generate(drafter, tokens(MASK), [], 4) == []


def test_more_than_one_token_needs_a_mask_token(drafter):
    """The tokenizer knows none, or names an id beyond the model's matrix: the start checkpoint."""
    for mask_id in (None, MASK + 1):
        for strategy in (Strategy(2), Strategy(2, None, "wide")):
            with pytest.raises(InputError, match="no mask token"):
                decode(drafter, tokens(mask_id), [[5]], strategy)
        assert generate(drafter, tokens(mask_id), [[5]], 1, max_new_tokens=2)[0].passes == 2


def test_chunks_as_they_come(drafter):
    """on_chunk is called with every row's new tokens, in order, and nothing else."""
    seen = {}
    results = generate(drafter, tokens(MASK, {9, 10}), random_prompts(4, seed=8), 3, 0.5, 15,
                       on_chunk=lambda row, new: seen.setdefault(row, []).append(list(new)))
    assert [seen[row] for row in range(4)] == [chunks_of(result) for result in results]


def test_real_model_writes_what_transformers_writes(smollm2):
    """SmolLM2, two plain texts and a chat prompt at once: transformers' greedy text, and sense."""
    import transformers

    tokenizer, ours = Tokenizer(smollm2), Transformer.from_pretrained(smollm2).eval()
    prompts = [tokenizer.encode(text) for text in ("The capital of France is", "1, 2, 3, 4,")]
    prompts.append(tokenizer.prompt("What is 7 + 5?", "chat"))
    results = generate(ours, tokenizer, prompts, max_new_tokens=24)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    for prompt, result in zip(prompts, results):
        text = theirs.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0]
        assert result.tokens == text[len(prompt):].tolist()
    # both read our conversion of the weights: only sense in the text shows that this is right
    texts = [tokenizer.decode(result.tokens) for result in results]
    assert "Paris" in texts[0] and "12" in texts[-1]


# --------------------------------------------------------------------------------------------------
# Which tokens, and how many

def test_accept():
    confidence = torch.tensor([
        [0.89, 0.99, 0.99, 0.99],           # slot 1 is unsure: it is kept all the same, and alone
        [0.99, 0.99, 0.89, 0.99],           # a gap ends the run
        [0.99, 0.90, 0.99, 0.99],           # as sure as the threshold is not above it
        [0.99, 0.91, 0.92, 0.93],
        [0.10, 0.20, 0.30, 1e-6],
        [1.00, 1.00, 1.00, 1.00],
    ])
    assert accept(confidence, 0.9).tolist() == [1, 2, 1, 4, 1, 4]
    assert accept(confidence, 0.0).tolist() == accept(confidence, None).tolist() == [4] * 6
    assert accept(confidence, 1.0).tolist() == [1] * 6
    assert accept(confidence[:, :1], 0.9).tolist() == accept(confidence[:, :1], None).tolist()
    assert accept(confidence, None).dtype == accept(confidence, 0.9).dtype == torch.long
    for threshold in (None, 0.0, 0.3, 0.9, 0.99, 1.0):      # the slow reference is of one mind
        slow = [sure_ones(row.tolist(), threshold) for row in confidence.double()]
        assert accept(confidence.double(), threshold).tolist() == slow


def test_choose_strategy():
    for flags, (k, threshold) in {
            (None, None): (4, 0.9), (3, None): (3, None), (None, 0.5): (4, 0.5),
            (2, 0.5): (2, 0.5), (None, 0.0): (4, 0.0)}.items():
        assert choose_strategy(*flags, 4) == Strategy(k, threshold)
    assert choose_strategy(None, None, 4, "wide") == Strategy(4, None, "wide")
    assert choose_strategy(None, 0.5, 4, "narrow") == Strategy(4, 0.5, "narrow")
    # what heads draft is always verified, whatever else was asked for
    heads = object()
    for flags, expected in {
            (None, None): Strategy(4, None, "heads"), (3, None): Strategy(3, None, "heads"),
            (None, 0.5): Strategy(4, 0.5, "heads"), (1, 0.5): Strategy(1)}.items():
        assert choose_strategy(*flags, 4, heads=heads) == expected
    assert choose_strategy(None, None, 4, "wide", heads) == Strategy(4, None, "heads")
    for k in (0, 5):
        for more in ({}, {"heads": heads}):
            with pytest.raises(InputError, match="1 to 4"):
                choose_strategy(k, None, 4, **more)
    assert choose_strategy(None, 0.9, 1) == Strategy(1) == choose_strategy(1, 0.9, 4)
    names = {Strategy(): "k = 1", Strategy(3): "static 3",
             Strategy(4, 0.95): "adaptive 0.95", Strategy(4, None, "wide"): "lossless 4",
             Strategy(4, 0.5, "narrow"): "lossless 4 narrow at 0.5",
             Strategy(5, None, "heads"): "lossless 5 heads"}
    assert [strategy.name for strategy in names] == list(names.values())


def test_draw_follows_the_distribution():
    """Shares of 4000 draws in each of two places with logits of their own."""
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0], [3.0, -torch.inf, 2.0, 2.0]])
    generator = torch.Generator().manual_seed(0)

    def shares(temperature=1.0, top_k=0, top_p=1.0):
        many = logits.repeat(4000, 1, 1)                                        # (4000, 2, 4)
        token, p = draw(many, temperature, top_k, top_p, generator)
        assert token.shape == p.shape == (4000, 2)
        # the probability that is reported is the model's own, whatever it was drawn from
        assert torch.equal(p, many.softmax(dim=-1).gather(-1, token[..., None])[..., 0])
        return torch.stack([token[:, place].bincount(minlength=4) / 4000 for place in (0, 1)])

    def close(drawn, expected):
        torch.testing.assert_close(drawn, torch.as_tensor(expected), rtol=0, atol=0.03)

    close(shares(), logits.softmax(dim=-1))
    close(shares(temperature=2.0), (logits / 2).softmax(dim=-1))
    two = torch.tensor([0.0, 1.0]).softmax(dim=-1).tolist()         # between logits 1 and 2
    close(shares(top_k=2)[0], [0, *two, 0])
    close(shares(top_p=0.8)[0], [0, *two, 0])                       # 0.64 is less than 0.8
    close(shares(top_k=2, top_p=0.75)[0], [0, *two, 0])             # of the two the first has 0.73
    assert shares(top_k=2, top_p=0.7)[0].tolist() == shares(top_p=0.6)[0].tolist() == [0, 0, 1, 0]
    assert shares(top_k=1)[1].tolist() == shares(temperature=1e-3)[1].tolist() == [1, 0, 0, 0]


def test_sampling_repeats_with_its_seed(drafter):
    prompts = random_prompts(3, seed=6)

    def texts(seed=0, **settings):
        settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | settings
        generator = torch.Generator().manual_seed(seed)
        choose = functools.partial(draw, generator=generator, **settings)
        results = generate(drafter, tokens(MASK), prompts, 1, max_new_tokens=20, choose=choose)
        assert all(result.chunks == [1] * 20 and MASK not in result.tokens for result in results)
        return [result.tokens for result in results]

    greedy = [r.tokens for r in generate(drafter, tokens(MASK), prompts, 1, max_new_tokens=20)]
    assert texts(seed=1) == texts(seed=1) != texts(seed=2) != greedy
    assert texts(top_k=1) == texts(top_p=1e-9) == texts(temperature=1e-6) == greedy


# --------------------------------------------------------------------------------------------------
# Where an answer ends

@pytest.mark.parametrize("limit", range(1, 10))
def test_ends_inside_a_chunk(drafter, limit):
    """Cut at the limit or after the first stop token; what was written behind counts nowhere."""
    prompt = random_prompts(1, seed=6)
    free, = generate(drafter, tokens(MASK), prompt, 4, max_new_tokens=12)
    stop = free.tokens[limit]                           # comes one token too late, unless it recurs
    for stop_ids, most in (({stop}, limit), ({stop}, 12), ((), limit)):
        result, = generate(drafter, tokens(MASK, stop_ids), prompt, 4, max_new_tokens=most)
        n = free.tokens.index(stop) + 1 if stop_ids else most
        assert result.tokens == free.tokens[:min(n, most)]
        assert result.finish == ("stop" if stop_ids and n <= most else "length")
        assert sum(result.chunks) == len(result.tokens) == len(result.confidences)
        assert result.tokens_per_forward == len(result.tokens) / len(result.chunks)


def test_cut(drafter):
    """Three new tokens behind two, with token 17 written as <17>."""
    def cut(limit, stop_ids, stops):
        answers = Answers(drafter, tokens(None, stop_ids), [[5]], limit, stops)
        answers.results[0].tokens = [1, 2]
        return answers.cut(0, [3, 4, 5])

    assert cut(10, (), ["2><3"]) == ([3], "stop string")
    assert cut(10, (), ["<1><2><3><4"]) == ([3, 4], "stop string")
    assert cut(10, (), ["<1><2>"]) == ([3, 4, 5], "")               # it was there before this chunk
    assert cut(10, (), ["<4><5", "<3><4"]) == ([3, 4], "stop string")
    assert cut(10, {4}, ["<3><4><5"]) == ([3, 4], "stop")
    assert cut(3, {4}, ()) == ([3], "length")                       # the stop was never emitted
    assert cut(4, {4}, ()) == ([3, 4], "stop")
    assert cut(10, (), ()) == ([3, 4, 5], "")


def test_stop_string_across_chunks(drafter):
    """It begins in the middle of a token of the first chunk and ends in one of the second."""
    prompt, stand_in = random_prompts(1, seed=7), tokens(MASK)
    free, = generate(drafter, stand_in, prompt, 3, max_new_tokens=12)
    stop = stand_in.token_bytes(free.tokens[2:4]).decode()[2:-1]
    result, = generate(drafter, stand_in, prompt, 3, max_new_tokens=12, stop_strings=["x", stop])
    assert outcome([result]) == [(free.tokens[:4], [3, 1], "stop string")]


@pytest.fixture(scope="module")
def alternating(tmp_path_factory):
    """A model that writes éééé behind half an é, with any k up to 2; and its Tokenizer.

    In this vocabulary é is two tokens, one for each byte. Nothing in the model looks back: each
    token predicts the other one, and the mask token the first.
    """
    folder = tiny_checkpoint(tmp_path_factory.mktemp("alternating") / "checkpoint", tied=False)
    model, tokenizer = Transformer.from_pretrained(folder).eval(), Tokenizer(folder)
    tokenizer.add_mask_token()
    add_mask_token(model, tokenizer.mask_id)
    first, second = tokenizer.encode("é")
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        state = model.model.norm(model.model.embed_tokens.weight)                   # (V, C)
        model.lm_head.weight.zero_()
        model.lm_head.weight[second] = state[first]
        model.lm_head.weight[first] = state[second] + state[tokenizer.mask_id]
    return model, tokenizer


@pytest.mark.parametrize("strategy", [
    Strategy(2), Strategy(2, 0.5), Strategy(2, None, "wide"), Strategy(2, None, "narrow")],
    ids=lambda strategy: strategy.name)
@pytest.mark.parametrize("stop, length", [("é", 3), ("éé", 5), ("xéé", None)])
def test_stop_string_whose_last_character_spans_two_tokens(alternating, strategy, stop, length):
    """Of each é the second half begins a chunk, and what was found is what k = 1 finds."""
    model, tokenizer = alternating
    first, second = tokenizer.encode("é")
    prompts = [[first], [5, first]]
    ending = {"max_new_tokens": 8, "stop_strings": [stop]}
    plain, ours = (decode(model, tokenizer, prompts, way, **ending)
                   for way in (Strategy(1), strategy))
    for result, reference in zip(ours, plain):
        assert result.tokens == reference.tokens == ([second, first] * 4)[:length]
        assert result.finish == reference.finish == ("stop string" if length else "length")
        assert result.passes < reference.passes and 2 in result.chunks


# --------------------------------------------------------------------------------------------------
# What is said about it

def test_speeds_and_summary(drafter):
    batch = generate(drafter, tokens(MASK), random_prompts(3, seed=9), 3, max_new_tokens=9)
    total, first = sum(len(r.tokens) for r in batch), sum(r.chunks[0] for r in batch)
    seconds, prompt_seconds = max(r.seconds for r in batch), batch[0].prompt_seconds
    assert 0 < prompt_seconds < seconds
    decoding = (total - first) / (seconds - prompt_seconds)
    assert speeds([batch]) == pytest.approx((total / seconds, decoding))
    text = summary([batch])
    assert "27 tokens in 9 passes: 3.00 +- 0.00" in text
    assert "3 x 9" in text and "length x 3" in text
    assert (f"{total / seconds:.1f} new tokens/s, the prompt's pass included; {decoding:.1f} from "
            "the second pass on\n") in text
    # nothing behind the prompt's pass: no such speed
    one = summary([generate(drafter, tokens(), [[5, 6]], 1, max_new_tokens=1)])
    assert "the prompt's pass included\n" in one and "nan" not in one
    assert shared_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert shared_prefix([1], [1, 2]) == 1 == shared_prefix([1, 2], [1])
