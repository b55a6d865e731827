"""
Several tokens per forward pass, from a language model that was trained with mask tokens.

    model = AutoModelForCausalLM.from_pretrained("out/latest")
    inputs = AutoTokenizer.from_pretrained("out/latest")(prompt, return_tensors="pt")
    model.generate(**inputs, max_new_tokens=100,
                   custom_generate="out/latest", trust_remote_code=True, threshold=0.9)

Loaded with trust_remote_code=True, a model does so by itself: model.generate(**inputs).

The idea (arXiv 2602.06019). Behind the text stand k - 1 copies of one special token, the mask token
M. The pass that predicts the next token at the text's last one also predicts, at each M, the token
after that. k = 3:

    fed          x     M     M          x: the newest token, not read yet (at first: the prompt)
    predicts     y1    y2    y3         y1 as ever; y2 without having seen y1, y3 neither of them
    probability  .98   .97   .62        of each, the most likely token

    fed          y1    y2    M     M    y1 and y2 were kept: now they are text, and M stand behind
    predicts           z1    z2    z3

How many are kept:

    k=3                 static: all three
    threshold=0.9       adaptive: the run from y1 on with probabilities above it; y1 in any case
    both                adaptive, at most three
    lossless=True       those that the next pass confirms: the text of k=1, up to rounding

Lossless decoding keeps y1, which is certain, and feeds y2 and y3 as *drafts*:

    fed          y1    y2    y3    M     M
    predicts     e1    e2    e3    e4    e5     e1: what the model itself writes behind y1, ...

    y2 = e1, y3 = e2    both stand; e3 is certain, and e4 and e5 are the next drafts
    y2 = e1, y3 != e2   y2 stands; e2 is certain. Each M has read the wrong y3: no drafts this time
                        (nanoMTP's speculate.py calls this form narrow)

Attention is the model's own, causal: mask tokens stand last, so no text ever sees one. After a pass
the key/value cache is cut back to the text; what M and wrong drafts have left there goes.

Of a model with adapters (nanoMTP's adapters.py) the weights are those from before training. At mask
tokens, and nowhere else, a linear layer W has two thin matrices beside it: W x + B A x.
"""
import functools

import torch
from safetensors.torch import load_file
from transformers import DynamicCache, GenerationMixin
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.utils import cached_file


def generate(inputs=None, *, model, k=None, threshold=None, lossless=False, streamer=None,
             **settings):
    """What model.generate(custom_generate=...) calls, and returns what it returns.

    k           most tokens per pass (default: as many as the model was trained for)
    threshold   see above (default: 0.9 where neither k nor lossless is given)
    lossless    see above. A threshold then limits what is drafted
    streamer    gets the tokens of a pass together
    settings    generate's. One prompt at a time, always the most likely token. What ends a text
                counts (max_new_tokens, max_length, eos_token_id, max_time, ...), penalties do not
    """
    note = getattr(model.config, "nanomtp", {})             # config.json: left there by training
    if "mask_token_id" not in note:
        raise ValueError("this model was not trained with mask tokens")
    if note.get("bidirectional"):
        raise ValueError("this model's mask tokens see each other both ways, not causally: decode "
                         "it with nanoMTP's sample.py")
    if settings.get("do_sample"):
        raise ValueError("do_sample=True: here the most likely tokens are chosen, always")
    if k is not None and not 1 <= k <= note["k_max"]:
        raise ValueError(f"k={k}: this model was trained for 1 to {note['k_max']} tokens per pass")
    if k is None and threshold is None and not lossless:
        threshold = 0.9
    if "adapters" in note and not hasattr(model, "adapters_attached"):
        attach_adapters(model, note["mask_token_id"])
        model.adapters_attached = True
    # transformers prepares everything as for its own decoding, then calls our loop
    settings["custom_generate"] = functools.partial(
        decode, mask_id=note["mask_token_id"], k=k or note["k_max"], threshold=threshold,
        lossless=lossless, streamer=streamer)
    return GenerationMixin.generate(model, inputs, streamer=streamer, **settings)


def attach_adapters(model, mask_id):
    """Let the model's modules read mask tokens as training has it. Text is none of their business,
    so it is no harm that the hooks stay."""
    where = cached_file(model.name_or_path, "adapters/adapter_model.safetensors")
    weights = {name: x.to(model.device, model.dtype) for name, x in load_file(where).items()}
    mask_row = weights["base_model.model.model.embed_tokens.mask_row"]
    masks = None                                            # (1, T) bool: where one was fed

    def before_embedding(module, args):
        nonlocal masks
        masks = args[0] == mask_id
        return (args[0].masked_fill(masks, 0),)             # the embedding may have no row for it

    def after_embedding(module, args, embedded):
        return torch.where(masks[..., None], mask_row, embedded)

    def after_linear(A, B, module, args, y):
        return y.index_put((masks,), args[0][masks] @ A.T @ B.T, accumulate=True)

    embedding = model.get_input_embeddings()
    embedding.register_forward_pre_hook(before_embedding)
    embedding.register_forward_hook(after_embedding)
    for name, module in model.named_modules():
        A = weights.get(f"base_model.model.{name}.lora_A.weight")                   # (r, in)
        B = weights.get(f"base_model.model.{name}.lora_B.weight")                   # (out, r)
        if A is not None:
            module.register_forward_hook(functools.partial(after_linear, A, B))


def decode(model, text, logits_processor, stopping_criteria, generation_config, *,
           mask_id, k, threshold, lossless, streamer, **prepared):
    """The loop. text: (1, T) long, the prompt's ids. Returns it with the answer behind."""
    seen = prepared.get("attention_mask")                   # 0 where there is padding
    if len(text) != 1 or (seen is not None and not seen.all()):
        raise ValueError("one prompt at a time, without padding, for several tokens per pass")
    text = text.to(model.device)
    cache = DynamicCache()
    certain, drafts = text[0].tolist(), []                  # what no pass has read yet
    ended = False

    while not ended:
        # --- 1. A pass predicts at the last certain token, at each draft, and at each M
        fed = certain + drafts + [mask_id] * (k - 1)
        logits = model(torch.tensor([fed], device=model.device), past_key_values=cache,
                       use_cache=True, logits_to_keep=len(drafts) + k).logits[0].float()
        logits[:, mask_id:mask_id + 1] = -torch.inf         # M, if it is there, is never written
        probability, predicted = logits.softmax(dim=-1).max(dim=-1)     # (drafts + k,) each
        predicted = predicted.tolist()

        # --- 2. Drafts stand, up to the first that the model would not have written itself
        stood = 0
        while stood < len(drafts) and drafts[stood] == predicted[stood]:
            stood += 1

        # --- 3. Behind them comes the model's own token and, if no draft fell, what the M predict;
        # of all these the run that is sure enough
        ahead = predicted[stood:] if stood == len(drafts) else predicted[stood:stood + 1]
        if threshold is not None:
            sure = (probability[stood:] > threshold).long().cumprod(dim=0).sum().item()
            ahead = ahead[:max(sure, 1)]

        # --- 4. The cache holds on to what is text: certain tokens and drafts that stood
        too_many = len(drafts) - stood + k - 1
        if too_many:
            cache.crop(-too_many)

        # --- 5. All of the run is kept; or its first token, and the others are the next drafts
        kept = 1 if lossless else len(ahead)
        new = drafts[:stood] + ahead[:kept]
        certain, drafts = ahead[:kept], ahead[kept:]

        # --- 6. Any of the new tokens may be the last one, at an end token or at the limit
        before = text.shape[1]
        text = torch.cat((text, torch.tensor([new], device=text.device)), dim=1)
        for length in range(before + 1, before + 1 + len(new)):
            ended = bool(stopping_criteria(text[:, :length], None))
            if ended:
                text = text[:, :length]
                break
        if streamer is not None:
            streamer.put(text[0, before:].cpu())

    if streamer is not None:
        streamer.end()
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=text)
    return text
