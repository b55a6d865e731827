"""
Our decoding inside EleutherAI's lm-eval: any generate_until task, static or adaptive k, or heads.

    pip install -r requirements-dev.txt                         # lm-eval is no run-time requirement
    python -m studies.lm_eval_adapter --tasks gsm8k_cot --model out --threshold 0.9 --limit 100
    python -m studies.lm_eval_adapter --tasks my_task --include folder/with/its/yaml --k 3

The harness brings prompts, worked examples, stop strings and scoring; our decoding writes the
answers. Log-likelihoods (multiple choice, perplexity) come from one ordinary pass without mask
tokens: decoding plays no part in them. From Python:

    lm_eval.simple_evaluate(model="nanomtp", model_args="model=out,threshold=0.9", tasks=[...])
"""
import json
import statistics
from pathlib import Path

from tqdm import tqdm

from common import cli
from common.cli import ArgumentParser, InputError
from common.files import write_json
from common.hub import default_model, offline_where_out_of_reach
from common.machine import machine, pick_device, pick_dtype
from common.report import summary
from eval_gsm8k import log_likelihoods
from sample import choose_strategy, load
from speculate import decode
from studies import needs

if __name__ == "__main__":
    offline_where_out_of_reach()                # which lm-eval's libraries ask when imported
try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
except ModuleNotFoundError:
    cli.run(lambda: needs("lm_eval"))           # one line and exit code 2, not a traceback
    raise


@register_model("nanomtp")
class NanoMTP(TemplateLM):
    """An lm-eval model. Arguments are those of sample.py's flags, but

    prompt_format   what is made of a request's text, its worked examples included: "text" nothing
                    (BOS in front where the model wants one), "plain" and "chat" as in training: all
                    of it is one question

    batches, an attribute: after a run the Answers of every batch, for `report.summary`.
    """
    backend = "causal"          # TemplateLM then encodes a continuation behind its context

    def __init__(self, model=None, k=None, threshold=None, prompt_format="text",
                 max_new_tokens=256, batch_size=8, device="auto", dtype="auto", **_):
        super().__init__()
        self._device = pick_device(device)
        self.model, self.tokenizer, trained, self.heads = load(
            model or default_model(), self._device, pick_dtype(dtype, self._device))
        self.strategy = choose_strategy(
            k, threshold, trained.get("k_max", 1), heads=self.heads)
        self.prompt_format, self.max_new_tokens = prompt_format, max_new_tokens
        self.batch_size, self.batches = int(batch_size), []

    @property
    def eot_token_id(self):
        return self.tokenizer.end_id

    @property
    def context(self):
        return self.model.config.max_position_embeddings

    def tok_encode(self, string, add_special_tokens=None, **_):
        bos = self.tokenizer.bos_id
        front = [] if bos is None or add_special_tokens is False else [bos]
        return front + self.tokenizer.encode(string)

    def prompt(self, text, room):
        """Ids of a request, of which the last `room` are kept."""
        if self.prompt_format == "text":
            ids = self.tok_encode(text)
        else:
            ids = self.tokenizer.prompt(text, self.prompt_format)
        return ids[-room:] or [self.eot_token_id]

    def answer(self, texts, limit, stops):
        """The answers to a batch of requests' texts, each up to its first stop string."""
        prompts = [self.prompt(text, self.context - limit) for text in texts]
        results = decode(self.model, self.tokenizer, prompts, self.strategy, self.heads,
                         max_new_tokens=limit, stop_strings=stops)
        self.batches.append(results)
        answers = [self.tokenizer.decode(result.tokens) for result in results]
        for stop in stops:
            answers = [answer.split(stop)[0] for answer in answers]
        return answers

    def generate_until(self, requests, disable_tqdm=False):
        """A text per request, in order. Texts end before the first stop string; long prompts lose
        their beginning. InputError for a task that asks for sampling."""
        texts, groups = [None] * len(requests), {}
        for i, request in enumerate(requests):      # those with the same settings decode together
            settings = json.dumps(request.args[1], sort_keys=True)
            groups.setdefault(settings, []).append(i)
        with tqdm(total=len(requests), disable=disable_tqdm, unit="answer",
                  dynamic_ncols=True) as bar:
            for settings, members in groups.items():
                kwargs = normalize_gen_kwargs(json.loads(settings), self.max_new_tokens)
                if kwargs.get("do_sample"):
                    raise InputError("the task asks for sampling; this decoding is greedy")
                stops = [stop for stop in kwargs["until"] if stop]
                limit = min(kwargs["max_gen_toks"], self.context - 1)
                for first in range(0, len(members), self.batch_size):
                    batch = members[first:first + self.batch_size]
                    answers = self.answer([requests[i].args[0] for i in batch], limit, stops)
                    for i, text in zip(batch, answers):
                        texts[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.update(len(batch))
        return texts

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **_):
        """[(texts, context ids, continuation ids)] -> [(sum of log p in nats, is it the greedy
        continuation?)]"""
        answers = []
        bar = tqdm(requests, disable=disable_tqdm, unit="continuation", dynamic_ncols=True)
        for texts, context, continuation in bar:
            room = max(1, self.context - len(continuation))
            log_p, greedy = log_likelihoods(
                self.model, context[-room:], continuation, self.tokenizer.mask_id)
            answers.append((sum(log_p), all(greedy)))
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answers[-1])
        return answers

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Sum of log p over whole texts, in windows of the context's length that share a token."""
        answers = []
        for request in tqdm(requests, disable=disable_tqdm, unit="text", dynamic_ncols=True):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(
                ids, self.eot_token_id, max_seq_len=self.context - 1, context_len=1)
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            sums = self._loglikelihood_tokens(parts, disable_tqdm=True)
            answers.append(sum(log_p for log_p, _ in sums))
        return answers


def main():
    parser = ArgumentParser(prog="-m studies.lm_eval_adapter", description=__doc__)
    add = parser.add_argument_group("what to ask").add_argument
    add("--tasks", nargs="+", required=True, help="names that lm-eval knows, such as gsm8k_cot")
    add("--include", help="a folder with more task files")
    add("--limit", type=int, help="only the first N documents of each task")
    add("--shots", type=int, help="worked examples (the task's own number)")
    cli.add_prompt_format_flag(
        add, "text", default="text: as the harness has it; in the others all of it is one question")
    add("--seed", type=int, default=0,
        help="which worked examples, where a task draws them (%(default)s)")
    add = parser.add_argument_group("decoding").add_argument
    cli.add_strategy_flags(add)
    add("--max-new-tokens", type=int, default=256,
        help="where the task sets no limit (%(default)s)")
    add("--batch-size", type=int, default=8, help="requests decoded together (%(default)s)")
    add = parser.add_argument_group("model, files, machine").add_argument
    cli.add_model_flag(add)
    add("--out", help="folder for results.json (none)")
    cli.add_machine_flags(add)
    args = parser.parse_args()
    cli.at_least(args, limit=1, shots=0, max_new_tokens=1, batch_size=1)

    model = NanoMTP(args.model, args.k, args.threshold, args.prompt_format or "text",
                    args.max_new_tokens, args.batch_size, args.device, args.dtype)
    is_new = args.out and not Path(args.out).exists()
    out = cli.output_folder(args.out) if args.out else None
    try:
        results = simple_evaluate(
            model, tasks=args.tasks, num_fewshot=args.shots, limit=args.limit,
            task_manager=TaskManager(include_path=args.include), fewshot_random_seed=args.seed)
    except (ValueError, KeyError, OSError) as error:        # an unknown task, a hub out of reach
        if is_new:
            out.rmdir()
        raise InputError(f"lm-eval: {error}") from None
    print(make_table(results))
    if model.batches:
        print(summary(model.batches))
    if out:
        rates = [answer.tokens_per_forward for batch in model.batches for answer in batch]
        write_json(out / "results.json", {
            **machine(model.device), "settings": vars(args), "results": results["results"],
            "tokens_per_forward": statistics.fmean(rates) if rates else None})


if __name__ == "__main__":
    cli.run(main)
