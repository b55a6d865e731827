"""
The rows of a batch while they are decoded: what each has written, and where it ends.

    answers = Answers(model, tokenizer, prompts, max_new_tokens=256)
    while answers.active:
        ...                                             # a pass: one chunk of tokens for each row
        going = answers.add(chunks, confidences)        # cut each chunk where its row ends
    return answers.results

The loops in sample.py and speculate.py share this and nothing else; it knows no masks and no model.
"""
import time
from dataclasses import dataclass, field

from common.cli import InputError
from common.machine import cores


@dataclass
class Answer:
    """What one prompt was answered with."""
    tokens: list = field(default_factory=list)          # emitted ids, the stop token included
    confidences: list = field(default_factory=list)     # each token's probability
    chunks: list = field(default_factory=list)          # tokens of each pass, after every cut
    drafts: list = field(default_factory=list)          # speculate.py: (fed, stood) by pass
    finish: str = ""                                    # "stop" (token), "stop string" or "length"
    prompt_seconds: float = 0.0                         # of the pass that reads the prompt
    seconds: float = 0.0                                # from the start to this row's last token

    @property
    def passes(self):
        return len(self.chunks)

    @property
    def tokens_per_forward(self):
        """Emitted tokens / passes, the prompt's pass included, since it emits tokens too."""
        return len(self.tokens) / self.passes


def check_prompts(prompts, model):
    """InputError for an empty prompt, or one that leaves no room in the model's context: before
    any of them is answered."""
    context = model.config.max_position_embeddings
    for number, prompt in enumerate(prompts, 1):
        if not 0 < len(prompt) < context:
            raise InputError(f"question {number} has {len(prompt)} tokens as a prompt, which does "
                             f"not fit the model's context of {context} tokens: leave it out")


class Answers:
    """A batch of Answers in the making.

    results   one Answer per prompt, in the prompts' order
    active    the rows still decoding, in the order in which they stand in the batch
    longest   most tokens that any text, prompt and answer, may have: room for the cache
    """

    def __init__(self, model, tokenizer, prompts, max_new_tokens, stop_strings=(), on_chunk=None):
        """A batch of which nothing is written yet. Raises InputError as `check_prompts` does.

        prompts         lists of ids; lengths may differ
        max_new_tokens  limit per row, exact even in the middle of a chunk; the context's end is one
        stop_strings    a row also ends with the token that completes one of these
        on_chunk        called as on_chunk(row, new ids) after every pass of every row
        """
        check_prompts(prompts, model)
        context = model.config.max_position_embeddings
        self.tokenizer, self.on_chunk = tokenizer, on_chunk
        self.stops = [stop.encode() for stop in stop_strings]
        self.limits = [min(max_new_tokens, context - len(prompt)) for prompt in prompts]
        self.longest = max((len(p) + n for p, n in zip(prompts, self.limits)), default=0)
        self.results = [Answer() for _ in prompts]
        self.active = list(range(len(prompts)))
        cores.look(wait=0.2)
        self.start = time.perf_counter()

    def add(self, chunks, confidences):
        """Append a chunk of tokens to every active row. Returns the places in the batch that go on.

        chunks, confidences   lists in the order of `active`; confidences may be longer than chunks
        """
        now, going = time.perf_counter() - self.start, []
        for place, row in enumerate(self.active):
            answer = self.results[row]
            new, answer.finish = self.cut(row, chunks[place])
            answer.tokens += new
            answer.confidences += confidences[place][:len(new)]
            answer.chunks.append(len(new))
            answer.seconds = now
            if answer.passes == 1:
                answer.prompt_seconds = now
            if not answer.finish:
                going.append(place)
            if self.on_chunk:
                self.on_chunk(row, new)
        self.active = [self.active[place] for place in going]
        cores.look()
        return going

    def cut(self, row, new):
        """Where a row's new chunk ends: (tokens to keep of `new`, finish reason or "")."""
        written, limit = self.results[row].tokens, self.limits[row]
        new = new[:limit - len(written)]            # first: what lies beyond is not emitted
        for n, token in enumerate(new, 1):
            if token in self.tokenizer.stop_ids:
                return new[:n], "stop"
            if self.stops and self.ends_in_stop(written, new[:n]):
                return new[:n], "stop string"
        return new, "length" if len(written) + len(new) == limit else ""

    def ends_in_stop(self, written, new):
        """Does a stop string end within `new`? Searched in bytes: a character may span two tokens.

        It may begin in an earlier chunk, so the search starts len(stop) - 1 bytes before this one.
        """
        before = len(self.tokenizer.token_bytes(written))
        text = self.tokenizer.token_bytes(written + new)
        return any(stop in text[max(0, before - len(stop) + 1):] for stop in self.stops)
