"""A tiny vision-language pair with its processor and rows with pictures; needs Pillow, not torchvision."""

from __future__ import annotations

from pathlib import Path

import torch
from datasets import Dataset
from tiny import CHARACTERS, SPECIAL
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForImageTextToText, Gemma3Config, Gemma3Processor, PreTrainedTokenizerFast
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

PICTURE = ["<start_of_image>", "<image_soft_token>", "<end_of_image>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<start_of_image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_processor() -> Gemma3Processor:
    """Return a character tokenizer with the tokens of a picture, and an image processor for 28 x 28 pixels."""
    vocabulary = {token: row for row, token in enumerate([*SPECIAL, *PICTURE, "\n", *CHARACTERS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<|pad|>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=[*SPECIAL[2:], *PICTURE],
        extra_special_tokens=dict(zip(("boi_token", "image_token", "eoi_token"), PICTURE, strict=True)),
    )
    pictures = Gemma3ImageProcessorPil(size={"height": 28, "width": 28}, do_pan_and_scan=False)
    return Gemma3Processor(pictures, tokenizer, chat_template=TEMPLATE, image_seq_length=4)


def make_vision_pair(folder: Path) -> tuple[Path, Path]:
    """Save BASE and INSTRUCT (BASE plus noise) below `folder`: two layers of text, one of vision, width 16."""
    processor = make_processor()
    ids = processor.tokenizer.convert_tokens_to_ids(PICTURE)
    config = Gemma3Config(
        text_config={
            "vocab_size": len(processor.tokenizer),
            **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
            **{"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 64, "max_position_embeddings": 256},
            **{"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "query_pre_attn_scalar": 8},
        },
        vision_config={
            **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
            **{"image_size": 28, "patch_size": 7},
        },
        mm_tokens_per_image=4,
        boi_token_index=ids[0],
        image_token_index=ids[1],
        eoi_token_index=ids[2],
        **{"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None},
    )
    torch.manual_seed(2)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    for name in ("base", "instruct"):
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.02 * weight.abs().mean() * torch.randn_like(weight))
    return folder / "base", folder / "instruct"


def picture_rows(kind: str, rows: int = 8) -> Dataset:
    """Return conversational rows with one picture each: `sft` (prompt, completion) or `dpo` (preferences)."""
    from PIL import Image

    found = []
    for row in range(rows):
        prompt = [{"role": "user", "content": f"what is {row}"}]
        answers = {"completion": str(row)} if kind == "sft" else {"chosen": str(row), "rejected": f"no {row}"}
        found.append(
            {
                "images": [Image.new("RGB", (28, 28), (row * 30 % 256, 40, 200 - row * 20))],
                "prompt": prompt,
                **{name: [{"role": "assistant", "content": text}] for name, text in answers.items()},
            }
        )
    return Dataset.from_list(found)
