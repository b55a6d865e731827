"""
Text to token ids and back: tiktoken, built from a Hugging Face tokenizer.json.

    from tokenizer import Tokenizer
    tokenizer = Tokenizer("path/to/a/hugging/face/folder")
    ids = tokenizer.prompt("What is 2 + 3?", "chat")            # the family's chat template around a question
    text = tokenizer.decode(ids)

Three families share one scheme, byte-level BPE, and differ in how text is cut into pieces before merging: SmolLM2,
Llama 3 and Qwen 2/3. Anything else is refused, because a tokenizer that is almost right trains a model that is almost
right, and nothing tells you.

Control tokens (<|im_end|>, <|eot_id|>, ...) come from templates only. `encode` reads them in a user's text as the
ordinary characters they are, so no prompt can end a turn, open a system turn or place a mask.
"""
import json
import re
import unicodedata
from pathlib import Path

import tiktoken

from common.cli import InputError
from common.files import read_json, write_json

MASK_TOKEN = "<|mtp|>"

# How text is cut before merging. Llama 3 and Qwen state their regex in tokenizer.json. SmolLM2 states two passes (every
# digit alone, then GPT-2's regex): one regex says the same, if white space before a digit ends its piece.
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
SMOLLM2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"

# Chat templates for one question: (a phrase that only this family's Jinja template contains, the rendered text).
# The first match wins. No Jinja at run time: a template is a program, and we need one turn of four families.
CHAT_TEMPLATES = [
    ("named SmolLM",
     "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
     "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"),
    ("You are Qwen, created by Alibaba Cloud",
     "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
     "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"),
    ("enable_thinking",         # the hybrid Qwen3 models, thinking switched off
     "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"),
    ("<|im_start|>",            # Qwen3-*-Instruct-2507
     "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"),
    ("Cutting Knowledge Date",  # Llama 3.1 and 3.2; the date is pinned to the templates' own default
     "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
     "Today Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{question}<|eot_id|>"
     "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    ("<|start_header_id|>",     # Llama 3.0
     "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{question}<|eot_id|>"
     "<|start_header_id|>assistant<|end_header_id|>\n\n"),
]


def byte_alphabet():
    """GPT-2's printable stand-in for each byte: {character: byte}. Printable bytes stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def split_pattern(pre_tokenizer):
    """The regex for a parsed `pre_tokenizer` block. Raises InputError for one we have not verified."""
    block = pre_tokenizer or {}
    parts = block.get("pretokenizers", [block])
    first, last = parts[0], parts[-1]
    if len(parts) == 2 and last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if first.get("type") == "Digits" and first.get("individual_digits") and last.get("use_regex", True):
            return SMOLLM2
        if first.get("type") == "Split" and first.get("behavior") == "Isolated" and not last.get("use_regex", True):
            pattern = first.get("pattern", {}).get("Regex")
            if pattern in (LLAMA3, QWEN) and not first.get("invert"):
                return pattern
    raise InputError(f"unknown pre-tokenizer {json.dumps(block)[:120]} (supported: SmolLM2, Llama 3, Qwen 2 and 3)")


def adds_bos(post_processor):
    """The token that a parsed `post_processor` block puts in front of every text (a string), or None."""
    block = post_processor or {}
    for part in block.get("processors", [block]):
        first = (part.get("single") or [{}])[0]
        if part.get("type") == "TemplateProcessing" and "SpecialToken" in first:
            return first["SpecialToken"]["id"]
    return None


class Tokenizer:
    """The tokenizer of one Hugging Face folder. Raises InputError where a file is missing or a scheme is unknown.

    bos_id      id put in front of a plain prompt, or None
    end_id      id that ends every training response; always one of `stop_ids`
    stop_ids    ids that end generation (generation_config.json, else config.json)
    mask_id     id of the mask token, or None in a model that has not been trained for several tokens
    free_id     first id that no token used when the folder was read: where a mask token goes
    default_format   the prompt format where nothing else is known: "chat" where there is a template
    """

    def __init__(self, folder):
        folder = Path(folder)
        self.files = {"tokenizer.json": read_json(folder / "tokenizer.json")}
        for name in ("tokenizer_config.json", "generation_config.json"):
            self.files[name] = read_json(folder / name) if (folder / name).exists() else {}
        settings, config = self.files["tokenizer_config.json"], read_json(folder / "config.json")
        described = self.files["tokenizer.json"]
        bpe = described.get("model", {})
        if bpe.get("type") != "BPE" or bpe.get("byte_fallback"):
            raise InputError(f"{folder}/tokenizer.json is no byte-level BPE (supported: SmolLM2, Llama 3, Qwen 2/3)")

        # --- vocabulary: printable stand-ins back to bytes; what is in `added_tokens` never takes part in merging
        added = {token["content"]: token["id"] for token in described.get("added_tokens", [])}
        self.hidden_ids = {token["id"] for token in described.get("added_tokens", []) if token.get("special")}
        alphabet = byte_alphabet()
        pattern = split_pattern(described.get("pre_tokenizer"))
        ranks = {bytes(alphabet[c] for c in token): i for token, i in bpe["vocab"].items() if token not in added}
        # tiktoken merges the pair with the lowest id first, tokenizers the pair listed first: the same, if sorted alike
        merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in bpe.get("merges", []))
        merged = [bpe["vocab"].get("".join(pair), -1) for pair in merges]
        if any(a > b for a, b in zip(merged, merged[1:])):
            raise InputError(f"{folder}/tokenizer.json lists its merges in another order than its ids: unsupported")
        self.control = added
        self.free_id = max([*ranks.values(), *added.values()]) + 1
        self.by_id = {i: token for token, i in ranks.items()} | {i: text.encode() for text, i in added.items()}
        # SmolLM2 has no token for 21 rare bytes. tokenizers drops such bytes in silence, tiktoken panics. We give them
        # ids past every real one, and drop those ids after encoding. (One difference is left: tokenizers drops the byte
        # before merging, so its neighbours may merge over the gap; here they do not.)
        missing = (bytes([byte]) for byte in range(256) if bytes([byte]) not in ranks)
        ranks |= {byte: self.free_id + i for i, byte in enumerate(missing)}
        self.bpe = tiktoken.Encoding(folder.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

        # Qwen reads text in Unicode's composed form
        normalizer = described.get("normalizer")
        if (normalizer or {}).get("type", "NFC") != "NFC":
            raise InputError(f"{folder}/tokenizer.json has an unknown normalizer {normalizer['type']!r}")
        self.nfc = normalizer is not None

        # --- which control tokens mean what
        def id_of(name):
            token = settings.get(name)
            return added.get(token.get("content") if isinstance(token, dict) else token)

        stops = self.files["generation_config.json"].get("eos_token_id")
        stops = config.get("eos_token_id") if stops is None else stops
        self.stop_ids = set(stops if isinstance(stops, list) else [stops]) - {None}
        self.end_id = id_of("eos_token") if id_of("eos_token") is not None else min(self.stop_ids, default=None)
        if self.end_id is None:
            raise InputError(f"{folder} names no end-of-text token (eos_token in tokenizer_config.json)")
        self.stop_ids.add(self.end_id)
        # A tokenizer with a BOS of its own decides whether to use it; one without leaves it to config.json (Qwen: the
        # paper puts config.json's 151643 in front of every text).
        if adds_bos(described.get("post_processor")):
            self.bos_id = added.get(adds_bos(described["post_processor"]))
        elif id_of("bos_token") is not None:
            self.bos_id = id_of("bos_token") if settings.get("add_bos_token") else None
        else:
            self.bos_id = config.get("bos_token_id")
        self.mask_id = added.get(MASK_TOKEN)

        # --- chat template: the family is told by a phrase of its Jinja source, wherever that is kept
        jinja = folder / "chat_template.jinja"
        source = jinja.read_text(encoding="utf-8") if jinja.exists() else json.dumps(
            settings.get("chat_template") or "", ensure_ascii=False)
        self.jinja = jinja.read_bytes() if jinja.exists() else None
        self.chat = next((text for phrase, text in CHAT_TEMPLATES if phrase in source), None)
        self.default_format = "chat" if self.chat else "plain"

    def encode(self, text):
        """Ids of ordinary text (a list of int). Control tokens spelled out in it are read as plain characters."""
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        return [i for i in self.bpe.encode_ordinary(text) if i < self.free_id]

    def encode_template(self, template, **fields):
        """Ids of trusted text: control tokens count in `template`, never in the `fields` that are filled into it."""
        names = sorted(self.control, key=len, reverse=True)
        ids = []
        for piece in re.split("(" + "|".join(map(re.escape, names)) + ")", template) if names else [template]:
            ids += [self.control[piece]] if piece in self.control else self.encode(piece.format(**fields))
        return ids

    def prompt(self, question, style):
        """Ids of one question, ready to be answered.

        style   "plain": the question and a blank line, BOS in front where the model wants one (the paper's format for
                Qwen); "chat": the family's chat template. Raises InputError where the model has no known template.
        """
        if style == "plain":
            return ([self.bos_id] if self.bos_id is not None else []) + self.encode(question + "\n\n")
        if style != "chat" or self.chat is None:
            raise InputError(f"no prompt format {style!r} for this model (plain" + (", chat)" if self.chat else
                             "; it has no chat template that we know)"))
        llama = "<|start_header_id|>" in self.chat              # Llama's templates trim the question
        return self.encode_template(self.chat, question=question.strip() if llama else question)

    def response(self, text):
        """Ids of a training answer, the end token included."""
        return self.encode(text) + [self.end_id]

    def token_bytes(self, ids):
        """UTF-8 bytes of `ids`; control tokens, and ids that no token uses, are silent."""
        return b"".join(self.by_id.get(i, b"") for i in ids if i not in self.hidden_ids)

    def decode(self, ids):
        """Text of `ids`; bytes that are not valid UTF-8 become U+FFFD."""
        return self.token_bytes(ids).decode("utf-8", errors="replace")

    def add_mask_token(self):
        """Give the mask token the first free id, unless it has one already.

        Later `save` writes it for us and for transformers, whose decoding never emits it:
        generation_config.json lists it under `suppress_tokens`.
        """
        if self.mask_id is not None:
            return
        self.mask_id = self.free_id
        entry = dict(content=MASK_TOKEN, lstrip=False, normalized=False, rstrip=False,
                     single_word=False, special=True)
        described = self.files["tokenizer.json"]
        described.setdefault("added_tokens", []).append({"id": self.mask_id, **entry})
        settings = self.files["tokenizer_config.json"]
        if "added_tokens_decoder" in settings:              # transformers 4 keeps a second list
            settings["added_tokens_decoder"][str(self.mask_id)] = entry

    def save(self, folder):
        """Write the tokenizer's files into `folder`."""
        generation = self.files["generation_config.json"]
        if self.mask_id is not None:
            suppressed = set(generation.get("suppress_tokens") or []) | {self.mask_id}
            generation["suppress_tokens"] = sorted(suppressed)
        generation.setdefault("eos_token_id", sorted(self.stop_ids))
        for name, content in self.files.items():
            write_json(Path(folder) / name, content)
        if self.jinja is not None:
            (Path(folder) / "chat_template.jinja").write_bytes(self.jinja)
