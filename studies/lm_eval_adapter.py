"""
Our decoding inside EleutherAI's lm-eval: any generate_until task, with static or confidence-adaptive k.

    pip install -r requirements-dev.txt                                     # lm-eval is no run-time requirement
    python -m extras.lm_eval_adapter --tasks gsm8k_cot --model out --threshold 0.9 --limit 100
    python -m extras.lm_eval_adapter --tasks my_task --include folder/with/its/yaml --k 3

The harness brings prompts, worked examples, stop strings and scoring; `generate` writes the answers. Log-likelihoods
(multiple choice, perplexity) come from one ordinary pass without masks: decoding plays no part in them.
From Python: `lm_eval.simple_evaluate(model="nanomtp", model_args="model=out,threshold=0.9", tasks=[...])`.
"""
import json
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
from tqdm import tqdm

from eval_gsm8k import log_likelihoods
from extras.machine import DTYPES, machine, pick_device, pick_dtype
from extras.report import summary
from pretrained import ArgumentParser, InputError, run, write_json
from sample import default_model, generate, load, strategy


@register_model("nanomtp")
class NanoMTP(TemplateLM):
    """An lm-eval model. Arguments are those of sample.py's flags.

    prompt_format   what is made of a request's text, its worked examples included: "text" nothing (BOS in front where
                    the model wants one), "plain" and "chat" as in training: all of it is one question
    batches         after a run: the Generations of every batch, for `report.summary`
    """
    backend = "causal"                                      # TemplateLM: a continuation is encoded behind its context

    def __init__(self, model=None, k=None, threshold=None, prompt_format="text", max_new_tokens=256, batch_size=8,
                 device="auto", dtype="auto", cache=None, **_):
        super().__init__()
        self._device = pick_device(device)
        self.model, self.tokenizer, trained = load(
            model or default_model(), self._device, pick_dtype(dtype, self._device), cache)
        self.k, self.threshold = strategy(k, threshold, trained.get("k_max", 1))
        self.prompt_format, self.max_new_tokens, self.batch_size = prompt_format, max_new_tokens, int(batch_size)
        self.batches = []

    @property
    def eot_token_id(self):
        return self.tokenizer.end_id

    @property
    def context(self):
        return self.model.config.max_position_embeddings

    def tok_encode(self, string, add_special_tokens=None, **_):
        bos = [] if self.tokenizer.bos_id is None or add_special_tokens is False else [self.tokenizer.bos_id]
        return bos + self.tokenizer.encode(string)

    def generate_until(self, requests, disable_tqdm=False):
        """A text per request, in order. Texts end before the first stop string; long prompts lose their beginning."""
        texts, groups = [None] * len(requests), {}
        for i, request in enumerate(requests):              # requests with the same settings are decoded together
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        bar = tqdm(total=len(requests), disable=disable_tqdm, unit="answer")
        for settings, members in groups.items():
            kwargs = normalize_gen_kwargs(json.loads(settings), self.max_new_tokens)
            if kwargs.get("do_sample"):
                raise InputError("the task asks for sampling; this decoding is greedy (--gen-kwargs is not supported)")
            stops, limit = [stop for stop in kwargs["until"] if stop], min(kwargs["max_gen_toks"], self.context - 1)
            for at in range(0, len(members), self.batch_size):
                batch = members[at:at + self.batch_size]
                prompts = []
                for i in batch:
                    text = requests[i].args[0]
                    ids = (self.tok_encode(text) if self.prompt_format == "text" else
                           self.tokenizer.prompt(text, self.prompt_format))
                    prompts.append(ids[-(self.context - limit):] or [self.eot_token_id])
                results = generate(self.model, prompts, self.k, self.threshold, self.tokenizer.mask_id,
                                   self.tokenizer.stop_ids, limit, stops, self.tokenizer.decode)
                self.batches.append(results)
                for i, result in zip(batch, results):
                    texts[i] = self.tokenizer.decode(result.tokens)
                    for stop in stops:
                        texts[i] = texts[i].split(stop)[0]
                    self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
                bar.update(len(batch))
        bar.close()
        return texts

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **_):
        """[(texts, context ids, continuation ids)] -> [(sum of log p in nats, is it the greedy continuation?)]"""
        answers = []
        for texts, context, continuation in tqdm(requests, disable=disable_tqdm, unit="continuation"):
            room = max(1, self.context - len(continuation))
            log_p, greedy = log_likelihoods(self.model, context[-room:], continuation, self.tokenizer.mask_id)
            answers.append((sum(log_p), all(greedy)))
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answers[-1])
        return answers

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Sum of log p over whole texts, in windows of the context's length that share one token."""
        answers = []
        for request in tqdm(requests, disable=disable_tqdm, unit="text"):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.eot_token_id, max_seq_len=self.context - 1, context_len=1)
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            answers.append(sum(log_p for log_p, _ in self._loglikelihood_tokens(parts, disable_tqdm=True)))
        return answers


def main():
    parser = ArgumentParser(prog="-m extras.lm_eval_adapter", description=__doc__)
    add = parser.add_argument_group("what to ask").add_argument
    add("--tasks", nargs="+", required=True, help="names that lm-eval knows, such as gsm8k_cot")
    add("--include", help="a folder with more task files")
    add("--limit", type=int, help="only the first N documents of each task")
    add("--shots", type=int, help="worked examples (the task's own number)")
    add("--prompt-format", choices=["text", "plain", "chat"], default="text", help="text: as the harness has it; plain, "
        "chat: all of it as one question (%(default)s)")
    add("--seed", type=int, default=0, help="which worked examples, where a task draws them (%(default)s)")
    add = parser.add_argument_group("decoding").add_argument
    add("--k", type=int, help="most tokens per pass; alone: static")
    add("--threshold", type=float, help="adaptive (0.9 where --k is not given either)")
    add("--max-new-tokens", type=int, default=256, help="where the task sets no limit (%(default)s)")
    add("--batch-size", type=int, default=8, help="(%(default)s)")
    add = parser.add_argument_group("model, files, machine").add_argument
    add("--model", help="a trained checkpoint (out/latest if there is one)")
    add("--cache", help="where converted checkpoints are kept ($NANOMTP_CACHE or ~/.cache/nanomtp)")
    add("--out", help="folder for results.json (none)")
    add("--device", default="auto", help="auto, cpu, cuda, mps (%(default)s)")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="(%(default)s)")
    args = parser.parse_args()
    try:
        if args.out:
            Path(args.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {args.out}: {error.strerror}") from None
    model = NanoMTP(args.model, args.k, args.threshold, args.prompt_format, args.max_new_tokens, args.batch_size,
                    args.device, args.dtype, args.cache)
    try:
        results = simple_evaluate(model, tasks=args.tasks, num_fewshot=args.shots, limit=args.limit,
                                  task_manager=TaskManager(include_path=args.include), fewshot_random_seed=args.seed)
    except (ValueError, KeyError, ConnectionError, OSError) as error:       # an unknown task, a hub out of reach
        raise InputError(f"lm-eval: {error}") from None
    print(make_table(results))
    if model.batches:
        print(summary(model.batches))
    if args.out:
        per_forward = [r.tokens_per_forward for batch in model.batches for r in batch]
        write_json(Path(args.out) / "results.json", {
            **machine(model.device), "settings": vars(args), "results": results["results"],
            "tokens_per_forward": sum(per_forward) / len(per_forward) if per_forward else None})


if __name__ == "__main__":
    run(main)
