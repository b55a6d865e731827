"""
Text to token ids and back: tiktoken, built from a Hugging Face tokenizer.json.

    from common.tokenizer import Tokenizer
    tokenizer = Tokenizer("path/to/a/hugging/face/folder")
    ids = tokenizer.prompt("What is 2 + 3?", "chat")        # the chat template around a question
    text = tokenizer.decode(ids)

Three families share one scheme, byte-level BPE, and differ in how text is cut into pieces before
merging: SmolLM2, Llama 3 and Qwen 2/3. Anything else is refused, because a tokenizer that is almost
right trains a model that is almost right, and nothing tells you.

Control tokens (<|im_end|>, <|eot_id|>, ...) come from templates only. `encode` reads them in a
user's text as the ordinary characters they are, so no prompt can end a turn, open a system turn or
place a mask token.
"""
import json
import re
import unicodedata
from pathlib import Path

import tiktoken

from common.cli import InputError, reading
from common.files import field, read_json, read_note, write_json

MASK_TOKEN = "<|mtp|>"

# --------------------------------------------------------------------------------------------------
# How text is cut before merging. Llama 3 and Qwen state their regex in tokenizer.json. SmolLM2
# states two passes (every digit alone, then GPT-2's regex): one regex says the same, if white space
# before a digit ends its piece.

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
SMOLLM2 = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+")

# --------------------------------------------------------------------------------------------------
# Chat templates for one question: (a phrase that only this family's Jinja template contains, the
# rendered text). The first match wins. No Jinja at run time: a template is a program, and we need
# one turn of four families.

CHAT_TEMPLATES = [
    ("named SmolLM",
     "<|im_start|>system\n"
     "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
     "<|im_start|>user\n{question}<|im_end|>\n"
     "<|im_start|>assistant\n"),
    ("You are Qwen, created by Alibaba Cloud",      # Qwen2.5
     "<|im_start|>system\n"
     "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
     "<|im_start|>user\n{question}<|im_end|>\n"
     "<|im_start|>assistant\n"),
    ("enable_thinking",                             # the hybrid Qwen3 models, thinking switched off
     "<|im_start|>user\n{question}<|im_end|>\n"
     "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
    ("<|im_start|>",                                # Qwen3-*-Instruct-2507
     "<|im_start|>user\n{question}<|im_end|>\n"
     "<|im_start|>assistant\n"),
    ("Cutting Knowledge Date",                      # Llama 3.1 and 3.2; the templates' default date
     "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
     "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
     "<|start_header_id|>user<|end_header_id|>\n\n{question}<|eot_id|>"
     "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    ("<|start_header_id|>",                         # Llama 3.0
     "<|begin_of_text|>"
     "<|start_header_id|>user<|end_header_id|>\n\n{question}<|eot_id|>"
     "<|start_header_id|>assistant<|end_header_id|>\n\n"),
]


# --------------------------------------------------------------------------------------------------
# Reading tokenizer.json

def byte_alphabet():
    """GPT-2's printable stand-in for each byte: {character: byte}.

    Printable bytes stand for themselves, the others are counted up from chr(256).
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet |= {chr(256 + i): byte for i, byte in enumerate(others)}
    return alphabet


def split_pattern(pre_tokenizer):
    """The regex for a parsed `pre_tokenizer` block. InputError for one we have not verified."""
    block = pre_tokenizer or {}
    parts = block.get("pretokenizers", [block])
    first, last = parts[0], parts[-1]
    if len(parts) == 2 and last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        splits_again = last.get("use_regex", True)              # by GPT-2's regex
        if first.get("type") == "Digits" and first.get("individual_digits") and splits_again:
            return SMOLLM2
        isolated = first.get("type") == "Split" and first.get("behavior") == "Isolated"
        if isolated and not splits_again:
            pattern = first.get("pattern", {}).get("Regex")
            if pattern in (LLAMA3, QWEN) and not first.get("invert"):
                return pattern
    raise InputError(f"unknown pre-tokenizer {json.dumps(block)[:120]} (supported: SmolLM2, Llama "
                     "3, Qwen 2 and 3)")


def bos_of(post_processor):
    """The token that a parsed `post_processor` block puts in front of every text, or None."""
    block = post_processor or {}
    for part in block.get("processors", [block]):
        first = (part.get("single") or [{}])[0]
        if part.get("type") == "TemplateProcessing" and "SpecialToken" in first:
            return first["SpecialToken"]["id"]
    return None


# --------------------------------------------------------------------------------------------------

class Tokenizer:
    """The tokenizer of one Hugging Face folder. InputError for a missing file or an unknown scheme.

    bos_id      id put in front of a plain prompt, or None
    end_id      id that ends every training response; always one of `stop_ids`
    stop_ids    ids that end generation (generation_config.json, else config.json)
    mask_id     id of the mask token, or None in a model not trained for several tokens
    free_id     first id that no token used when the folder was read: where a mask token goes
    default_format  the prompt format where nothing else is known: "chat" where there is a template
    """

    def __init__(self, folder):
        with reading(Path(folder) / "tokenizer.json"):
            self.read(Path(folder))

    def read(self, folder):
        """All of the above from the files of `folder`."""
        self.files = {"tokenizer.json": read_json(folder / "tokenizer.json")}
        for name in ("tokenizer_config.json", "generation_config.json"):
            self.files[name] = read_json(folder / name) if (folder / name).exists() else {}
        config = read_json(folder / "config.json")
        described, settings = self.files["tokenizer.json"], self.files["tokenizer_config.json"]
        bpe = described.get("model", {})
        if bpe.get("type") != "BPE" or bpe.get("byte_fallback"):
            raise InputError(f"{folder}/tokenizer.json is no byte-level BPE (supported: SmolLM2, "
                             "Llama 3, Qwen 2/3)")
        pattern = split_pattern(described.get("pre_tokenizer"))

        # --- vocabulary: printable stand-ins back to bytes. What is in `added_tokens` never takes
        # part in merging
        added_tokens = described.get("added_tokens", [])
        added = {token["content"]: token["id"] for token in added_tokens}
        self.control = added
        self.hidden_ids = {token["id"] for token in added_tokens if token.get("special")}
        alphabet = byte_alphabet()
        ranks = {}                                              # bytes of a token -> its id
        for token, i in bpe["vocab"].items():
            if token not in added:
                ranks[bytes(alphabet[character] for character in token)] = i
        self.by_id = {i: token for token, i in ranks.items()}
        self.by_id |= {i: text.encode() for text, i in added.items()}
        ids = [*ranks.values(), *added.values()]
        vocab_size = field(config, "vocab_size", int, 10 ** 8, least=1, most=10 ** 8)
        # the start model of adapters has no row for the mask token: that one is theirs
        rows = vocab_size + ("adapters" in read_note(config))
        fit = all(type(i) is int and 0 <= i < rows for i in ids)
        if not fit or len(set(ids)) < len(ids):
            raise InputError(f"{folder}/tokenizer.json: ids must differ, and lie below the "
                             f"vocab_size of config.json, {vocab_size}")
        self.free_id = max(ids) + 1

        # --- merges: tiktoken merges the pair with the lowest id first, tokenizers the pair listed
        # first. The same, if ids and list are in the same order
        merged = []                                             # ids of what the pairs make
        for merge in bpe.get("merges", []):
            pair = merge.split(" ") if isinstance(merge, str) else merge
            merged.append(bpe["vocab"].get("".join(pair), -1))
        if merged != sorted(merged):
            raise InputError(f"{folder}/tokenizer.json lists its merges in another order than its "
                             "ids: unsupported")

        # --- SmolLM2 has no token for 21 rare bytes. tokenizers drops such bytes in silence,
        # tiktoken panics. We give them ids past every real one, and drop those ids after encoding.
        # (One difference is left: tokenizers drops the byte before merging, so its neighbours may
        # merge over the gap; here they do not.)
        every_byte = [bytes([byte]) for byte in range(256)]
        missing = [byte for byte in every_byte if byte not in ranks]
        ranks |= {byte: self.free_id + i for i, byte in enumerate(missing)}
        self.bpe = tiktoken.Encoding(folder.name, pat_str=pattern, mergeable_ranks=ranks,
                                     special_tokens={})

        # --- Qwen reads text in Unicode's composed form
        normalizer = described.get("normalizer")
        self.nfc = normalizer is not None
        if self.nfc and normalizer.get("type", "NFC") != "NFC":
            raise InputError(f"{folder}/tokenizer.json has an unknown normalizer "
                             f"{normalizer['type']!r}")

        # --- which control tokens mean what
        def id_of(name):
            token = settings.get(name)
            return added.get(token.get("content") if isinstance(token, dict) else token)

        stops = self.files["generation_config.json"].get("eos_token_id")
        stops = config.get("eos_token_id") if stops is None else stops
        self.stop_ids = set(stops if isinstance(stops, list) else [stops]) - {None}
        self.end_id = id_of("eos_token")
        if self.end_id is None:
            self.end_id = min(self.stop_ids, default=None)
        if self.end_id is None:
            raise InputError(f"{folder} names no end-of-text token (eos_token in "
                             "tokenizer_config.json)")
        self.stop_ids.add(self.end_id)
        self.mask_id = added.get(MASK_TOKEN)
        noted = read_note(config).get("mask_token_id", self.mask_id)
        if noted != self.mask_id:
            raise InputError(f"{folder}: the mask token is {noted} in config.json, and "
                             f"{self.mask_id} in tokenizer.json")

        # A tokenizer with a BOS of its own decides whether to use it; one without leaves it to
        # config.json (Qwen: the paper puts config.json's 151643 in front of every text)
        bos = bos_of(described.get("post_processor"))
        if bos:
            self.bos_id = added.get(bos)
        elif id_of("bos_token") is not None:
            self.bos_id = id_of("bos_token") if settings.get("add_bos_token") else None
        else:
            self.bos_id = config.get("bos_token_id")

        self.read_chat_template(folder, settings)

    def read_chat_template(self, folder, settings):
        """A phrase of its Jinja source, wherever that is kept, tells the family."""
        jinja = folder / "chat_template.jinja"
        self.jinja = None
        source = json.dumps(settings.get("chat_template") or "", ensure_ascii=False)
        if jinja.exists():
            self.jinja = jinja.read_bytes()
            source = jinja.read_text(encoding="utf-8")
        known = [text for phrase, text in CHAT_TEMPLATES if phrase in source]
        self.chat = known[0] if known else None
        self.default_format = "chat" if known else "plain"

    # --- text to ids

    def encode(self, text):
        """Ids of ordinary text, a list of int. Control tokens in it are plain characters."""
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        return [i for i in self.bpe.encode_ordinary(text) if i < self.free_id]

    def encode_template(self, template, **fields):
        """Ids of trusted text: control tokens count in `template`, never in the `fields` that are
        filled into it."""
        names = sorted(self.control, key=len, reverse=True)     # the longest that fits
        pieces = [template]
        if names:
            pieces = re.split("(" + "|".join(map(re.escape, names)) + ")", template)
        ids = []
        for piece in pieces:
            if piece in self.control:
                ids.append(self.control[piece])
            else:
                ids += self.encode(piece.format(**fields))
        return ids

    def prompt(self, question, style):
        """Ids of one question, ready to be answered.

        style   "plain": the question and a blank line, BOS in front where the model wants one (the
                paper's format for Qwen); "chat": the family's chat template. Raises InputError
                where the model has no known template.
        """
        if style == "plain":
            bos = [] if self.bos_id is None else [self.bos_id]
            return bos + self.encode(question + "\n\n")
        if style != "chat" or self.chat is None:
            known = "plain, chat" if self.chat else "plain; it has no chat template that we know"
            raise InputError(f"no prompt format {style!r} for this model ({known})")
        if "<|start_header_id|>" in self.chat:                  # Llama's templates trim it
            question = question.strip()
        return self.encode_template(self.chat, question=question)

    def response(self, text):
        """Ids of a training answer, the end token included."""
        return self.encode(text) + [self.end_id]

    # --- ids to text

    def token_bytes(self, ids):
        """UTF-8 bytes of `ids`; control tokens, and ids that no token uses, are silent."""
        return b"".join(self.by_id.get(i, b"") for i in ids if i not in self.hidden_ids)

    def visible_bytes(self, ids):
        """The same with control tokens by their names: what is shown of a pass."""
        return b"".join(self.by_id.get(i, b"") for i in ids)

    def decode(self, ids):
        """Text of `ids`; bytes that are not valid UTF-8 become U+FFFD."""
        return self.token_bytes(ids).decode("utf-8", errors="replace")

    # --- one token more, and back to disk

    def add_mask_token(self):
        """Give the mask token the first free id, unless it has one already.

        `save` then writes it for us and for transformers, whose decoding never emits it:
        generation_config.json lists it under `suppress_tokens`.
        """
        if self.mask_id is not None:
            return
        self.mask_id = self.free_id
        entry = {"content": MASK_TOKEN, "lstrip": False, "normalized": False, "rstrip": False,
                 "single_word": False, "special": True}
        described = self.files["tokenizer.json"]
        described.setdefault("added_tokens", []).append({"id": self.mask_id, **entry})
        settings = self.files["tokenizer_config.json"]
        if "added_tokens_decoder" in settings:                  # transformers 4 keeps a second list
            settings["added_tokens_decoder"][str(self.mask_id)] = entry

    def save(self, folder):
        """Write the tokenizer's files into `folder`."""
        folder = Path(folder)
        generation = self.files["generation_config.json"]
        if self.mask_id is not None:
            suppressed = set(generation.get("suppress_tokens") or []) | {self.mask_id}
            generation["suppress_tokens"] = sorted(suppressed)
        generation.setdefault("eos_token_id", sorted(self.stop_ids))
        for name, content in self.files.items():
            write_json(folder / name, content)
        if self.jinja is not None:
            (folder / "chat_template.jinja").write_bytes(self.jinja)
