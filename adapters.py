"""
Mask tokens on a model that stays untouched: low-rank adapters that act at mask tokens alone.

    python train.py --k 8 --adapters 64 --lr 3e-3 --steps 2000 --cooldown 800 --out out-adapters

Training all weights moves the text itself: k = 1 of the trained model is no longer the start model.
Here every weight of the start model is frozen. What is trained are two thin matrices beside each
linear layer of the blocks, A (r, in) and B (out, r), and the mask token's embedding:

    text token      y = W x                     the start model, to the last bit
    mask token      y = W x + B A x             W x plus what it has learned

(Gated LoRA: Samragh et al., arXiv 2507.11851; LoRA: Hu et al., arXiv 2106.09685.) Text never sees a
mask token, so its logits are those of the start model: k = 1 is the start model, and lossless
decoding writes the start model's text. And the teacher of mtp.py reads no mask tokens at all, so it
is the same module: one copy of the weights serves both, in bf16 where the machine is fast in it.

Training gets cheaper, too. What the text's tokens compute depends on nothing that is trained, so
they are read once for student and teacher, and without a gradient; only the regions are read by
each, and only theirs goes backward:

                            text            regions
    all weights     student, backward,      student, backward, teacher
                    teacher
    adapters        once, for both          student, backward, teacher

`save_adapters` writes them as PEFT has them, into a folder adapters/ of its own, with where the
start checkpoint is and a hash of it. PEFT applies them from a mask token on (as an "activated
LoRA"), so there, too, text stays the start model's. With --merge-start the start's weight files
lie beside that folder, byte for byte, and transformers opens the whole: custom_generate/generate.py
finds the adapters.

Shapes: B rows, T fed tokens, C hidden size, M mask tokens of a pass, r rank.
"""
import math
import shutil
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from common.cli import InputError, reading
from common.files import field, read_json, read_note, start_files, weight_files, write_json
from common.hub import resolve
from common.records import hash_of
from model import Fused, Transformer, add_custom_generate, add_mask_token, run_blocks

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# --------------------------------------------------------------------------------------------------
# The model: text once, then the regions

class TextCache:
    """Stands in for a KVCache: keeps the keys and values of the first pass, the text, and puts them
    in front of those of every later one, which it does not keep."""

    def __init__(self):
        self.keys, self.values = [], []                     # by layer: (B, T, G, D)

    def next_places(self, count):
        return None                                         # `write` needs none

    def write(self, layer, places, keys, values, span):
        if layer == len(self.keys):                         # the first pass
            self.keys.append(keys)
            self.values.append(values)
            return keys, values
        return (torch.cat((self.keys[layer], keys), dim=1),
                torch.cat((self.values[layer], values), dim=1))


class Adapted(Transformer):
    """A Transformer with adapters (`add_adapters`), which computes what a Transformer does. In
    training, that is without a cache, a pass with gradient is the student's; one without, on the
    same text, the teacher's."""
    text = None                     # the student's: ids, positions, its hidden states, a TextCache

    def forward(self, ids, positions, mask, cache=None, at=None, head=True):
        # --- 1. The text: for a student all that stands in front of the first mask token, which it
        # does not see. (If there is none, up to the last token, so that there always is a second
        # part: FSDP needs the same passes on all ranks.) A teacher has it from the student
        if cache is None and torch.is_grad_enabled():
            is_mask = (ids == self.model.embed_tokens.mask_id).any(dim=0)               # (L,)
            T = int(is_mask.long().argmax()) if is_mask.any() else ids.shape[1] - 1
            self.read_text(ids[:, :T], positions[:, :T], mask[..., :T, :T])
        elif cache is not None or not self.begins_with_text(ids, positions):
            return super().forward(ids, positions, mask, cache, at, head)
        _, _, x, keys = self.text
        T = x.shape[1]

        # --- 2. The regions behind it: mask tokens, or what the student wrote in their place
        y = self.model.embed_tokens(ids[:, T:])                                     # (B, L - T, C)
        y = run_blocks(self.model.layers, y, positions[:, T:], mask[..., T:, :], self.frequencies,
                       keys)
        x = torch.cat((x, y), dim=1)                                                # (B, L, C)
        x = self.model.norm(x if at is None else x[at])
        return self.logits(x) if head else x

    @torch.no_grad()
    def read_text(self, ids, positions, mask):
        self.text = None                                    # what there was of the last one goes
        self.frequencies, keys = self.frequencies.to(ids.device), TextCache()
        x = self.model.embed_tokens(ids)                                            # (B, T, C)
        x = run_blocks(self.model.layers, x, positions, mask, self.frequencies, keys)
        self.text = ids, positions, x, keys

    def begins_with_text(self, ids, positions):
        if self.text is None:
            return False
        T = self.text[0].shape[1]
        return torch.equal(ids[:, :T], self.text[0]) and torch.equal(positions[:, :T], self.text[1])


# --------------------------------------------------------------------------------------------------
# The modules beside its weights

class Gate:
    """Where the mask tokens of the present pass stand: (row, place), two (M,) long. Shared by all
    adapters of a model; its embedding sets it, which is the only one to see the ids."""
    at = None


class AdaptedLinear(nn.Module):
    """A frozen linear layer and, at mask tokens, its adapter. The weight keeps its name."""

    @property
    def joined(self):
        """What `model.fuse` makes of it and others."""
        return FusedAdapted

    def __init__(self, linear, rank, gate, generator):
        super().__init__()
        self.weight, self.bias, self.gate = linear.weight, linear.bias, gate
        self.out_features, (out, inner) = linear.out_features, linear.weight.shape
        # as LoRA: A random, B zero, so that training starts from the start model
        a = torch.empty(rank, inner)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        self.lora_A = nn.Parameter(a.to(linear.weight.device))                      # (r, in)
        self.lora_B = nn.Parameter(torch.zeros(out, rank, device=linear.weight.device))

    def forward(self, x):
        """(B, T, in) -> (B, T, out)"""
        y = F.linear(x, self.weight, self.bias)
        if not len(self.gate.at[0]):                        # text alone, as the teacher reads it
            return y
        extra = F.linear(F.linear(x[self.gate.at].float(), self.lora_A), self.lora_B)
        return y.index_put(self.gate.at, extra.to(y.dtype), accumulate=True)


class FusedAdapted(nn.Module):
    """The same of several layers with one input, for decoding: see `model.fuse`."""

    def __init__(self, *layers):
        super().__init__()
        self.fused, self.gate = Fused(*layers), layers[0].gate
        dtype = layers[0].weight.dtype
        A = torch.cat([layer.lora_A.detach() for layer in layers])                  # (n r, in)
        self.A = A.to(dtype)
        self.B = [layer.lora_B.detach().to(dtype) for layer in layers]              # (out, r) each

    def forward(self, x):
        y = self.fused(x)
        if len(self.gate.at[0]):
            inner = F.linear(x[self.gate.at], self.A).chunk(len(self.B), dim=-1)    # (M, r) each
            for part, own, B in zip([y] if torch.is_tensor(y) else y, inner, self.B):
                part[self.gate.at] += F.linear(own, B)
        return y


class AdaptedEmbedding(nn.Module):
    """The frozen embedding, with a trained row in place of the mask token's."""

    def __init__(self, embedding, mask_id, gate):
        super().__init__()
        self.weight, self.mask_id, self.gate = embedding.weight, mask_id, gate
        self.mask_row = nn.Parameter(embedding.weight[mask_id].detach().float().clone())    # (C,)

    def forward(self, ids):
        """(B, T) long -> (B, T, C)"""
        self.gate.at = (ids == self.mask_id).nonzero(as_tuple=True)
        x = F.embedding(ids, self.weight)
        return x.index_put(self.gate.at, self.mask_row.to(x.dtype))


def add_adapters(model, rank, mask_id, seed=0):
    """Freeze an Adapted and put adapters beside the linear layers of its blocks, in place. It
    has a row for the mask token already (`model.add_mask_token`)."""
    gate, generator = Gate(), torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    model.model.embed_tokens = AdaptedEmbedding(model.model.embed_tokens, mask_id, gate)
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, layer in list(part.named_children()):
                if name in TARGETS:
                    setattr(part, name, AdaptedLinear(layer, rank, gate, generator))
    return model


def trained_weights(model):
    """{name: tensor} of what is trained: adapters, and the mask token's row."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# --------------------------------------------------------------------------------------------------
# On disk

def on_disk(name):
    """What PEFT calls a tensor of ours."""
    name = name.replace("lora_A", "lora_A.weight").replace("lora_B", "lora_B.weight")
    return f"base_model.model.{name}"


def save_adapters(model, start, name, merge_start, folder, weights=None):
    """Write adapters and configuration into `folder`.

    start, name     the start checkpoint's folder, and what --model called it
    merge_start     copy the start's weights, too
    weights         {name: tensor} of the model, where they are not to be taken from itself
    """
    folder, weights = Path(folder), model.state_dict() if weights is None else weights
    own = {on_disk(key): weights[key].detach().cpu().float().contiguous()
           for key in trained_weights(model)}
    (folder / "adapters").mkdir()
    save_file(own, folder / "adapters" / "adapter_model.safetensors", metadata={"format": "pt"})
    rank = next(p for key, p in trained_weights(model).items() if key.endswith("lora_A")).shape[0]
    mask_id = model.model.embed_tokens.mask_id
    write_json(folder / "adapters" / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(name),
        "r": rank, "lora_alpha": rank, "target_modules": list(TARGETS),
        # without these PEFT would add B A x to the text, too
        "alora_invocation_tokens": [mask_id],
        "nanomtp": {"start": hash_of(weight_files(start))}})
    write_json(folder / "config.json", model.config.raw)    # the start's but for train.py's note
    if merge_start:
        for file in start_files(start):
            shutil.copy(file, folder)
        add_custom_generate(folder)


def start_of(folder):
    """The folder with the start's weights, for a folder with adapters: itself (--merge-start) or
    another one. InputError where they are not those that the adapters were trained on."""
    where = folder / "adapters" / "adapter_config.json"
    described = read_json(where)
    name = field(described, "base_model_name_or_path", str, where=where)
    start = folder if start_files(folder) else resolve(name)
    expected = field(described, "nanomtp", dict, {}, where=where).get("start")
    if expected != hash_of(weight_files(start)):
        raise InputError(f"{folder} was trained on another {name} than the one that is there")
    return start


def load_adapted(folder, dtype=torch.float32, device="cpu"):
    """The start model of a folder with its adapters, an Adapted. InputError where the two do not
    belong together, or one is damaged."""
    folder = Path(folder)
    where = folder / "adapters" / "adapter_config.json"
    rank = field(read_json(where), "r", int, least=1, most=10_000, where=where)
    config = read_json(folder / "config.json")
    model = Adapted.from_pretrained(start_of(folder), dtype, device)
    mask_id = field(read_note(config), "mask_token_id", int, where=where)
    if mask_id >= model.config.vocab_size:
        add_mask_token(model, mask_id)
    add_adapters(model, rank, mask_id)
    file = where.with_name("adapter_model.safetensors")
    with reading(file):
        weights = load_file(file)
        for key, p in trained_weights(model).items():
            there = weights[on_disk(key)]
            if there.shape != p.shape or not there.isfinite().all():
                raise InputError(f"{file}: {on_disk(key)} is not of shape {tuple(p.shape)}, or not "
                                 "finite")
            p.data.copy_(there)
    model.config.raw = config
    return model
