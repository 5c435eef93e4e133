"""`ghostvis convert`: weights from and to Hugging Face directories, and what differs."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ghostvis_mega.cli.output import EXIT_WRONG_SETTINGS, AsJson, conclude, print_rows
from ghostvis_mega.utils.errors import GhostVisError
from ghostvis_mega.utils.figures import Figure, at_least, at_most, measured
from ghostvis_mega.utils.logging import setup_logging

CONVERT_HELP = "Weights from and to Hugging Face, without a GPU or a process group."
IMPORT_HELP = """Make a checkpoint of Hugging Face weights, for `checkpoint.weights=OUT` of any run.

\b
Examples (a language model and a tower become one checkpoint; a LLaVA model is complete by itself):
  python -m ghostvis_mega convert import Qwen2.5-1.5B siglip-so400m --out weights/start \\
    --image-size 336
  python -m ghostvis_mega convert import llava-model --out weights/llava
  python -m ghostvis_mega convert import SmolLM2-135M-Instruct.Q4_1.gguf --out weights/smollm2 \\
    --new-tokens 2 --tokenizer weights/smollm2.json

\b
Read are Qwen2 and Llama text models, SigLIP and CLIP towers, LLaVA of these, and our own exports,
as safetensors; the text models from llama.cpp's GGUF files as well, put back into floating point.
Exit code: 0 done, 2 not possible; nothing is left behind.
"""
EXPORT_HELP = """Write a directory that transformers, vLLM and SGLang load, from a checkpoint.

\b
Examples:
  python -m ghostvis_mega convert export runs/demo/checkpoints/step-00001800 --out exports/demo \\
    --data datasets/easy-vqa-train.gvd
  python -m ghostvis_mega convert export runs/sft/checkpoints/step-00010000 --out exports/sft \\
    --data datasets/sft.gvd --dtype bf16
  python -m ghostvis_mega convert export weights/llava --out exports/llava --assets llava-model

\b
Formats: llava (connector mlp), ghostvis (other connectors; brings its code), text (the language
model alone), tower (the vision tower alone). The files of --assets are copied; with pictures, its
chat template must show one, which those of language models do not: give --data there.
Exit code: 0 done, 2 not possible.
"""
VERIFY_HELP = """Check a directory against its own digests, or two sets of weights for equal bits.

\b
Examples:
  python -m ghostvis_mega convert verify exports/demo
  python -m ghostvis_mega convert verify runs/demo/checkpoints/step-00001800 exports/demo
  python -m ghostvis_mega convert verify runs/demo/checkpoints/step-00001800 exports/demo \\
    --answers 8 --data datasets/easy-vqa-test.gvd

\b
With --answers both also answer questions about pictures, the checkpoint here and the directory in
transformers. Exit code: 0 as it should be, 1 damaged or different, 2 not readable.
"""
DIFF_HELP = """Show which tensors differ between two sets of weights and by how much.

\b
Example:
  python -m ghostvis_mega convert diff weights/start runs/sft/checkpoints/step-00010000 --part llm

\b
Exit code: 0 whatever differs, 2 not readable.
"""

QUANTIZE_HELP = """Write a copy of an export with INT8 or FP8 linear layers (compressed-tensors).

\b
Examples (INT8 for GPUs before Blackwell, FP8 from Ada on):
  python -m ghostvis_mega convert quantize exports/sft --out exports/sft-int8 --scheme int8
  python -m ghostvis_mega convert quantize exports/demo --out exports/demo-fp8 --scheme fp8 \\
    --data datasets/easy-vqa-test.gvd

\b
Weights have a scale for each output channel, inputs one for each token, taken as they come: no
calibration. Head, tower and connector stay as they are unless --skip says otherwise. Printed are
the size, the noise of each layer and, unless --samples is 0, how far predictions move (KL).
Exit code: 0 done, 1 the KL is above --bar, 2 not possible.
"""

convert_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help=CONVERT_HELP)
Part = Annotated[
    list[str] | None, typer.Option("--part", help="llm, vision or connector only; repeatable.")
]
Dtype = Annotated[str, typer.Option(help="auto (as it is), fp32 or bf16.")]
Force = Annotated[bool, typer.Option(help="Replace OUT if it is a checkpoint or an export.")]


def refuse(error: GhostVisError) -> typer.Exit:
    """Say what is wrong; the exit code for it."""
    typer.echo(f"error: {error}", err=True)
    return typer.Exit(EXIT_WRONG_SETTINGS)


@convert_app.command("import", help=IMPORT_HELP)
def import_(
    sources: Annotated[
        list[Path], typer.Argument(help="Directories or .gguf files.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="The checkpoint.", show_default=False)],
    dtype: Dtype = "auto",
    image_size: Annotated[
        int | None, typer.Option(help="Resize the tower's positions for such pictures.")
    ] = None,
    feature_layer: Annotated[
        int | None, typer.Option(help="Layer of a bare tower that is used (-1, CLIP: -2).")
    ] = None,
    post_norm: Annotated[
        bool | None, typer.Option(help="Use a bare tower's last norm (not with LLaVA).")
    ] = None,
    vocab_multiple: Annotated[
        int, typer.Option(min=1, help="Pad the vocabulary with zero rows to a multiple.")
    ] = 1,
    new_tokens: Annotated[
        int, typer.Option(min=0, help="Rows for tokens that the vocabulary lacks (<|image|>).")
    ] = 0,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Write the vocabulary of a GGUF file as tokenizer.json.")
    ] = None,
    force: Force = False,
) -> None:
    """Hugging Face weights become a checkpoint."""
    setup_logging(rank=0)
    from ghostvis_mega.convert.importer import ImportOptions, import_hf, tokenizer_json
    from ghostvis_mega.utils.files import write_output

    options = ImportOptions(
        dtype=dtype,
        image_size=image_size,
        feature_layer=feature_layer,
        post_norm=post_norm,
        vocab_multiple=vocab_multiple,
        new_tokens=new_tokens,
        force=force,
    )
    try:
        vocabulary = None if tokenizer is None else tokenizer_json(sources)
        import_hf(sources, out, options)
        if tokenizer is not None and vocabulary is not None:
            write_output(tokenizer, vocabulary)
    except GhostVisError as error:
        raise refuse(error) from None


@convert_app.command("export", help=EXPORT_HELP)
def export(
    checkpoint: Annotated[Path, typer.Argument(help="step-... directory.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The new directory.", show_default=False)],
    format: Annotated[str, typer.Option(help="auto, llava, ghostvis, text or tower.")] = "auto",
    dtype: Dtype = "auto",
    data: Annotated[
        Path | None, typer.Option(help="Prepared dataset: its tokenizer and chat template.")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer file instead.")] = None,
    template: Annotated[str, typer.Option(help="Chat template for --tokenizer.")] = "chatml",
    assets: Annotated[
        Path | None, typer.Option(help="Hugging Face directory whose tokenizer files to copy.")
    ] = None,
    image_token: Annotated[
        int | None, typer.Option(help="Id that stands for an image, where nothing says it.")
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(help="Rows of the vocabulary to write; the rest is padding.")
    ] = None,
    force: Force = False,
) -> None:
    """A checkpoint becomes a Hugging Face directory."""
    setup_logging(rank=0)
    if sum(given is not None for given in (data, tokenizer, assets)) > 1:
        raise typer.BadParameter("give one of --data, --tokenizer and --assets")
    from ghostvis_mega.convert.assets import Assets
    from ghostvis_mega.convert.exporter import ExportOptions, export_hf

    options = ExportOptions(
        format=format,
        dtype=dtype,
        assets=Assets(
            data=data,
            tokenizer=tokenizer,
            template=template,
            folder=assets,
            tokens={} if image_token is None else {"image": image_token},
        ),
        vocab_size=vocab_size,
        force=force,
    )
    try:
        export_hf(checkpoint, out, options)
    except GhostVisError as error:
        raise refuse(error) from None


@convert_app.command("quantize", help=QUANTIZE_HELP)
def quantize(
    source: Annotated[Path, typer.Argument(help="Hugging Face directory.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The new directory.", show_default=False)],
    scheme: Annotated[str, typer.Option(help="int8 or fp8.")] = "fp8",
    skip: Annotated[
        list[str] | None,
        typer.Option(help="Modules that stay: *.lm_head or re:.*lm_head; repeatable."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Prepared dataset to measure the KL on.")
    ] = None,
    samples: Annotated[
        int, typer.Option(min=0, help="Samples for the KL; 0 does not load the model.")
    ] = 16,
    bar: Annotated[float, typer.Option(help="Largest KL that is fine, in nats.")] = 0.02,
    top: Annotated[int, typer.Option(min=1, help="Layers to show, the noisiest first.")] = 10,
    as_json: AsJson = False,
    force: Force = False,
) -> None:
    """A directory becomes a smaller one."""
    setup_logging(rank=0)
    if data is not None and not samples:
        raise typer.BadParameter("--data is for the KL, which --samples 0 leaves out")
    from ghostvis_mega.convert.divergence import check_inputs, divergence
    from ghostvis_mega.convert.quantize import quantize_hf
    from ghostvis_mega.convert.schemes import DEFAULT_SKIP

    chosen = tuple(skip or DEFAULT_SKIP)
    try:
        if samples:
            check_inputs(source, data)
        done = quantize_hf(source, out, scheme=scheme, skip_modules=chosen, force=force)
        moved = None
        if samples:
            moved = divergence(source, scheme=scheme, skip_modules=chosen, data=data, count=samples)
    except GhostVisError as error:
        raise refuse(error) from None
    rows = [
        measured("size before", done.bytes_before / 1e9, "GB"),
        measured("size after", done.bytes_after / 1e9, "GB"),
        measured("layers quantised", len(done.layers), "layers"),
    ]
    if moved is not None:
        rows.append(at_most("logits KL", moved.kl, "nats", bar))
        rows.append(measured("same best token", moved.same_best, f"of {moved.positions} positions"))
    noisy = sorted(done.layers, key=lambda layer: layer.signal_to_noise_db)
    rows += [
        measured(layer.name, layer.signal_to_noise_db, "dB signal to noise")
        for layer in noisy[:top]
    ]
    conclude(rows, title=f"{scheme} {out}", as_json=as_json)


@convert_app.command("verify", help=VERIFY_HELP)
def verify(
    one: Annotated[Path, typer.Argument(help="Checkpoint or directory.", show_default=False)],
    other: Annotated[Path | None, typer.Argument(help="What it must equal.")] = None,
    part: Part = None,
    answers: Annotated[
        int,
        typer.Option(min=0, help="Pictures of --data, at most, to ask ours and theirs about."),
    ] = 0,
    data: Annotated[Path | None, typer.Option(help="Prepared dataset with questions.")] = None,
    as_json: AsJson = False,
) -> None:
    """Digests of one directory, or equality of two."""
    if answers and (other is None or data is None):
        raise typer.BadParameter("--answers compares a checkpoint with its export: give both, and "
                                 "--data")  # fmt: skip
    setup_logging(rank=0)
    from ghostvis_mega.convert.compare import compare, damage

    try:
        if other is None:
            problems = damage(one)
            rows = [at_most("damaged files", len(problems), "files", 0)]
        else:
            result = compare(one, other, parts=tuple(part or ()))
            problems = [f"{d.name}: {d.what}" for d in result.differences]
            rows = [
                measured("tensors in both", result.tensors, "tensors"),
                measured("size", round(result.num_bytes / 1e9, 3), "GB"),
                at_most("different tensors", len(problems), "tensors", 0),
            ]
            if other is not None and data is not None and answers:
                more, different = _asked(one, other, data, answers)
                rows, problems = [*rows, *more], [*problems, *different]
    except GhostVisError as error:
        raise refuse(error) from None
    for problem in problems[:20]:
        typer.echo(problem, err=True)
    conclude(rows, title=f"verify {one}", as_json=as_json)


def _asked(
    checkpoint: Path, export_folder: Path, data: Path, count: int
) -> tuple[list[Figure], list[str]]:
    """Rows about answers that ours and transformers give, and the pairs that differ."""
    from ghostvis_mega.eval.stock_answers import LARGEST_ERROR, answer_both

    found = answer_both(checkpoint, export_folder, data, count=count)
    different = [
        f"{pair.question!r}: {pair.ours!r} here, {pair.theirs!r} in transformers"
        for pair in found
        if not pair.same
    ]
    error = max(pair.error for pair in found)
    right = sum(pair.ours == pair.reference for pair in found)
    same = len(found) - len(different)
    rows = [
        at_least("answers that transformers gives as well, token for token", same, "", len(found)),
        at_most("greatest difference of a log-probability", error, "nats", LARGEST_ERROR),
        measured("answers that are right", right, f"of {len(found)}"),
    ]
    return rows, different


@convert_app.command("diff", help=DIFF_HELP)
def diff(
    one: Annotated[Path, typer.Argument(help="Checkpoint or directory.", show_default=False)],
    other: Annotated[Path, typer.Argument(help="Checkpoint or directory.", show_default=False)],
    part: Part = None,
    top: Annotated[int, typer.Option(min=1, help="Rows, the largest change first.")] = 20,
    as_json: AsJson = False,
) -> None:
    """What differs between two sets of weights."""
    setup_logging(rank=0)
    from ghostvis_mega.convert.compare import compare

    try:
        result = compare(one, other, parts=tuple(part or ()))
    except GhostVisError as error:
        raise refuse(error) from None
    found = sorted(result.differences, key=lambda d: (d.what == "values", -d.relative))
    rows = [
        measured(d.name, d.relative if d.elements else d.what, _detail(d) if d.elements else "")
        for d in found[:top]
    ]
    rows.append(measured("different tensors", len(found), f"of {result.tensors}"))
    print_rows(rows, title="relative difference", as_json=as_json)


def _detail(difference: Any) -> str:
    return f"relative; {difference.elements} elements, at most {difference.largest:.3g}"
