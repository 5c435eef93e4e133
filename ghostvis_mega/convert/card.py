"""The model card of an export: what the model is, how it was trained, how it is loaded."""

from collections.abc import Mapping
from typing import Any

from ghostvis_mega.convert.hf_config import Format
from ghostvis_mega.convert.mapping import Parts


def card(parts: Parts, form: Format, about: Mapping[str, Any], *, dtype: str) -> str:
    """README.md of an export.

    Args:
        parts: The model.
        form: Of the export.
        about: From `exporter.about_training`.
        dtype: Of the weights.
    """
    lines = ["---", "library_name: transformers"]
    if form in ("llava", "ghostvis"):
        lines.append("pipeline_tag: image-text-to-text")
    elif form == "text":
        lines.append("pipeline_tag: text-generation")
    lines += ["---", "", "# GhostVis model", "", *_table(parts, dtype), ""]
    lines += ["## Training", "", *_training(about), ""]
    lines += ["## Use", "", *_use(form), ""]
    lines += [
        "`ghostvis_export.json` holds size and SHA-256 of every file: "
        "`python -m ghostvis_mega convert verify DIRECTORY`.",
    ]
    return "\n".join(lines) + "\n"


def _table(parts: Parts, dtype: str) -> list[str]:
    rows = []
    if (llm := parts.llm) is not None:
        rows.append(
            (
                "language model",
                f"{llm.num_layers} layers, width {llm.hidden_size}, {llm.num_heads} heads, "
                f"{llm.num_kv_heads} key/value heads, {llm.max_positions} positions",
            )
        )
    if (vision := parts.vision) is not None:
        norm = "after" if vision.post_norm else "before"
        rows.append(
            (
                "vision tower",
                f"{vision.kind}, {vision.num_layers} layers, width {vision.hidden_size}, "
                f"{vision.image_size} pixels in patches of {vision.patch_size}, "
                f"layer {vision.feature_layer}, {norm} the last norm",
            )
        )
    if (connector := parts.connector) is not None:
        rows.append(("connector", f"{connector.kind}, {parts.tokens_per_image} tokens an image"))
    rows.append(("weights", dtype))
    return ["| part | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows)]


def _training(about: Mapping[str, Any]) -> list[str]:
    imported, lines = about.get("imported"), []
    if imported:
        lines.append(f"Weights imported from {', '.join(imported['from'])}.")
    if about.get("step"):
        lines.append(f"{about['step']} optimizer steps, {about['sequences']} sequences.")
        lines += ["", "| setting | value |", "|---|---|"]
        lines += [f"| `{name}` | {value} |" for name, value in about["training"].items()]
    return lines or ["The weights are those of step 0: not trained by GhostVis-Mega."]


def _use(form: Format) -> list[str]:
    if form == "tower":
        return [
            "```python",
            "from transformers import AutoModel",
            'tower = AutoModel.from_pretrained("DIRECTORY")',
            "```",
        ]
    if form == "text":
        return [
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            'model = AutoModelForCausalLM.from_pretrained("DIRECTORY")',
            'tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")',
            "```",
            "",
            "```",
            "vllm serve DIRECTORY",
            "python -m sglang.launch_server --model-path DIRECTORY",
            "```",
        ]
    own = form == "ghostvis"
    trust = ", trust_remote_code=True" if own else ""
    flag = " --trust-remote-code" if own else ""
    lines = [
        "```python",
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        f'model = AutoModelForImageTextToText.from_pretrained("DIRECTORY"{trust})',
        f'processor = AutoProcessor.from_pretrained("DIRECTORY"{trust})',
        'question = [{"type": "image"}, {"type": "text", "text": "What is it?"}]',
        'messages = [{"role": "user", "content": question}]',
        "prompt = processor.apply_chat_template(messages, add_generation_prompt=True)",
        'inputs = processor(text=prompt, images=[picture], return_tensors="pt")',
        "answer = model.generate(**inputs, max_new_tokens=32)",
        "```",
        "",
        "```",
        f"vllm serve DIRECTORY{flag}",
        f"python -m sglang.launch_server --model-path DIRECTORY --model-impl transformers{flag}",
        "```",
    ]
    if own:
        lines += [
            "",
            "The connector is none that transformers has, so the directory brings its code: two "
            "short files, to read before you allow them.",
        ]
    return lines
