"""The demo: a page where photographs meet their tags. Runs at home (`make app`) and as a Space.

The model is what the variable MODEL_ID names, a folder or a Hub id.
"""

import html
import os
import re
import sys
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image, ImageOps
from transformers import Pipeline, pipeline

EXAMPLES = Path(__file__).parent / "examples"
MAX_TAGS = 300
SHOWN_SIZE = (480, 480)  # of the heat map, in pixels
# Heat from nothing to the most there is: red, green, blue, opacity, as in the report.
RAMP = ((8, 12, 60, 185), (110, 20, 120, 155), (225, 50, 60, 130), (255, 150, 20, 125), (255, 235, 90, 130))

RANKING_CSS = """
ol { list-style: none; margin: 0; padding: 0; display: grid; gap: 6px; }
button {
  display: grid; grid-template: "mark label score" auto "mark bar bar" auto "mark note note" auto / 1.2em 1fr auto;
  gap: 2px 6px; width: 100%; padding: 8px 12px 8px 8px; text-align: left; cursor: pointer; font-weight: 400;
  color: var(--body-text-color-subdued); background: var(--background-fill-secondary);
  border: 1px solid var(--border-color-primary); border-radius: 8px;
}
button:hover, button:focus-visible { border-color: var(--color-accent); }
button[aria-pressed=true] { border-color: var(--color-accent); box-shadow: 0 0 0 1px var(--color-accent); }
.selected { color: var(--body-text-color); background: var(--color-accent-soft); }
.selected .label { font-weight: 600; }
.mark { grid-area: mark; color: var(--color-accent); font-weight: 700; }
.label { grid-area: label; overflow-wrap: anywhere; }
.score { grid-area: score; font-variant-numeric: tabular-nums; }
.bar { grid-area: bar; height: 5px; border-radius: 3px; background: var(--border-color-primary); overflow: hidden; }
.bar span { display: block; height: 100%; background: var(--body-text-color-subdued); }
.selected .bar span { background: var(--color-accent); }
.note { grid-area: note; font-size: 0.85em; color: var(--body-text-color-subdued); }
p { margin: 0 0 8px; color: var(--body-text-color-subdued); }
"""
CLICKED = """
element.addEventListener("click", event => {
  const button = event.target.closest("button[data-index]");
  if (button) trigger("select", {index: Number(button.dataset.index)});
});
"""
# However long the list of tags, the heat map stays in sight.
CSS = """
.gradio-container { max-width: 1080px !important; margin: 0 auto !important; overflow: clip !important; }
#heat-map { position: sticky; top: 8px; z-index: 1; }
@media (max-width: 640px) { #heat-map { height: 220px !important; } }
footer { display: none !important; }
"""


def read_tags(text: str) -> list[str]:
    """Tags separated by commas, semicolons or new lines.

    Raises:
        gr.Error: There are none, or too many.
    """
    tags = [tag.strip() for tag in re.split(r"[,;\n]", text or "")]
    tags = [tag for tag in tags if tag]
    if not tags:
        raise gr.Error("Type some tags first, separated by commas.", print_exception=False)
    if len(tags) > MAX_TAGS:
        raise gr.Error(f"{len(tags)} tags, at most {MAX_TAGS} are taken.", print_exception=False)
    return tags


def open_photograph(component: gr.Image, file: dict[str, Any] | None) -> Image.Image | None:
    """The photograph that `component` makes of its file, decoded.

    Args:
        component: Of `type="pil"`.
        file: What the page sends: the fields of `component.data_model`, or None.

    Raises:
        gr.Error: It cannot be read; the message is for the visitor.
    """
    if file is None:
        return None
    try:
        photograph = component.preprocess(component.data_model(**file))
        photograph.load()
    except Exception as error:  # every decoder of Pillow fails in its own way
        raise gr.Error("The photograph cannot be read. Try a JPEG or PNG.", print_exception=False) from error
    return photograph


def rank(
    summarizer: Pipeline, photograph: Image.Image | None, text: str, own_rule: bool, threshold: float
) -> dict[str, Any]:
    """Score the tags.

    Args:
        summarizer: The pipeline.
        photograph: Any size; None only for a tag-only model.
        text: The tags, as typed.
        own_rule: Select by the rule that the model brings along, not by `threshold`.
        threshold: In [0, 1].

    Returns:
        `result`, the pipeline's with `known` for the tags of the vocabulary; `square`, what the model saw of the
        photograph, or None; `shown`, the index of the tag with the heat map.

    Raises:
        gr.Error: Something is missing or cannot be read; the message is for the visitor.
    """
    tags = read_tags(text)
    if not summarizer.processor.use_images:
        photograph = None
    elif photograph is None:
        raise gr.Error("Drop a photograph first.", print_exception=False)
    rule = {} if own_rule else {"threshold": threshold}
    try:
        result = summarizer(photograph, candidate_labels=tags, return_attention=True, **rule)
    except ValueError as error:
        raise gr.Error(html.escape(str(error)), print_exception=False) from error
    known = set(summarizer.processor.vocabulary)
    return {
        "result": [{**item, "known": item["label"] in known} for item in result],
        "square": None if photograph is None else ImageOps.fit(as_rgb(photograph), SHOWN_SIZE),
        "shown": 0,
    }


def as_rgb(photograph: Image.Image) -> Image.Image:
    """A photograph of any mode in the colours in which the processor shows it to the model."""
    if photograph.mode.startswith("I;16") or (photograph.mode == "I" and photograph.format in ("PNG", "PPM")):
        # 16-bit grey, of which `convert("RGB")` would make everything white.
        photograph = photograph.convert("I").point(lambda value: value / 257 + 0.5).convert("L")
    return photograph.convert("RGB")


def ranking(result: list[dict], shown: int) -> str:
    """The tags as a list of buttons, of which that of the tag with the heat map, `shown`, is pressed."""
    num_selected = sum(item["selected"] for item in result)
    buttons = "".join(_button(item, index, index == shown) for index, item in enumerate(result))
    return f"<p>{num_selected} of {len(result)} tags chosen</p><ol>{buttons}</ol>"


def _button(item: dict, index: int, shown: bool) -> str:
    selected, pressed = item["selected"], shown and item["attention"] is not None
    return (
        f'<li><button type="button" class="{"selected" if selected else ""}" data-index="{index}"'
        f' aria-pressed="{str(pressed).lower()}">'
        f'<span class="mark">{"✓" if selected else ""}</span>'
        f'<span class="label">{html.escape(item["label"])}</span>'
        f'<span class="score">{item["score"]:.2f}</span>'
        f'<span class="bar"><span style="width: {item["score"]:.1%}"></span></span>'
        f'<span class="note">{describe(item)}</span></button></li>'
    )


def describe(item: dict) -> str:
    """What decided about a tag, and whether the model knows it."""
    notes = []
    if (gate := item["gate"]) is not None:
        notes.append(f"picture decided, {gate:.0%}" if gate >= 0.5 else f"other tags decided, {1 - gate:.0%}")
    if not item["known"]:
        notes.append("not in the model's vocabulary")
    return " · ".join(notes)


def heat_map(square: Image.Image, attention: list[list[float]]) -> Image.Image:
    """A photograph under a layer that is bright where the model looked; `attention` has (h, w) numbers."""
    heat = np.array(attention, dtype=np.float32)
    heat = np.asarray(Image.fromarray(heat / heat.max()).resize(square.size, Image.Resampling.BILINEAR))  # (S, S)
    steps = np.linspace(0, 1, len(RAMP))
    colours = [np.interp(heat, steps, channel) for channel in zip(*RAMP, strict=True)]
    layer = Image.fromarray(np.stack(colours, axis=-1).astype(np.uint8))
    return Image.alpha_composite(square.convert("RGBA"), layer).convert("RGB")


def show(ranked: dict[str, Any]) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """What `rank` returned, the value of the ranking, and an update of the heat map."""
    item = ranked["result"][ranked["shown"]]
    picture = gr.update(visible=False)
    if item["attention"] is not None:
        label = f"Where the model looked for: {item['label']}"
        picture = gr.update(value=heat_map(ranked["square"], item["attention"]), label=label, visible=True)
    return ranked, ranking(ranked["result"], ranked["shown"]), picture


def describe_rule(selection: dict[str, Any]) -> str:
    """The rule that a model brings along."""
    words = {
        "threshold": "a score of at least {threshold:.2f}",
        "top_k": "the {top_k} best",
        "expected_f1": "the set of tags that should fit best",
    }
    return words[selection["rule"]].format(**{"threshold": 0.5, **selection})


def build(summarizer: Pipeline, name: str) -> gr.Blocks:
    """The page for a model.

    Args:
        summarizer: `pipeline("tag-summarization")`.
        name: What to call the model.
    """
    use_images = summarizer.processor.use_images

    def read_and_rank(file, text, own_rule, threshold):
        if not isinstance(text or "", str) or not isinstance(threshold, (int, float)):
            raise gr.Error("The tags are a text, and the threshold is a number.", print_exception=False)
        return rank(summarizer, open_photograph(photograph, file), text, own_rule, threshold)

    def submit(photograph, text, own_rule, threshold):
        return show(read_and_rank(photograph, text, own_rule, threshold))

    def choose_again(before, photograph, text, own_rule, threshold):
        """By another rule, with the heat map of the same tag; nothing where nothing stands there."""
        if before is None:
            return gr.skip(), gr.skip(), gr.skip()
        after = read_and_rank(photograph, text, own_rule, threshold)
        if [item["label"] for item in after["result"]] == [item["label"] for item in before["result"]]:
            after["shown"] = before["shown"]
        return show(after)

    def choose_by_threshold(before, photograph, text, threshold):
        return False, *choose_again(before, photograph, text, False, threshold)

    def select(ranked, event: gr.EventData):
        return show({**ranked, "shown": event.index})

    with gr.Blocks(title="MAGNeto", analytics_enabled=False) as page:
        ranked = gr.State()
        gr.Markdown(
            "# Which tags matter?\n"
            f"{'Drop a photograph and type its' if use_images else 'Type the'} many tags: "
            "the ones that say what the photograph is about are marked. "
            f"Model: {html.escape(name)}, [MAGNeto](https://arxiv.org/abs/2011.04349)."
        )
        with gr.Row():
            with gr.Column():
                photograph = gr.Image(
                    label="Photograph",
                    type="pil",
                    image_mode=None,  # as it is: "RGB" would make 16-bit grey white
                    height=300,
                    sources=["upload", "clipboard"],
                    visible=use_images,
                    elem_id="photograph",
                )
                text = gr.Textbox(label="Tags", placeholder="beach, ocean, sunset, holiday", lines=3, max_lines=8)
                button = gr.Button("Rank the tags", variant="primary")
                own_rule = gr.Checkbox(
                    True, label="Choose by the model's own rule", info=describe_rule(summarizer.processor.selection)
                )
                threshold = gr.Slider(0, 1, 0.5, step=0.01, label="Or by a threshold", info="the lowest score to keep")
            with gr.Column():
                picture = gr.Image(height=300, visible=False, interactive=False, buttons=[], elem_id="heat-map")
                tags = gr.HTML(
                    "<p>The tags, best first, will stand here.</p>",
                    css_template=RANKING_CSS,
                    js_on_load=CLICKED,
                    elem_id="ranking",
                )
        inputs, outputs = [photograph, text, own_rule, threshold], [ranked, tags, picture]
        # Before a function is called, Gradio would open the photograph and answer a bad one by a bare "Error", also
        # with `type="filepath"`. So values come as the page sends them, and `open_photograph` opens it.
        as_sent = {"preprocess": False}
        if files := sorted(EXAMPLES.glob("*.txt")):
            rows = [[file.read_text(encoding="utf-8").strip()] for file in files]
            if use_images:
                rows = [[str(file.with_suffix(".jpg")), *row] for file, row in zip(files, rows, strict=True)]
            examples = gr.Examples(rows, [photograph, text] if use_images else [text], label="Examples")
            examples.load_input_event.then(submit, inputs, outputs, scroll_to_output=True, **as_sent)
        button.click(submit, inputs, outputs, scroll_to_output=True, **as_sent)
        own_rule.input(choose_again, [ranked, *inputs], outputs, **as_sent)
        threshold.input(
            choose_by_threshold,
            [ranked, photograph, text, threshold],
            [own_rule, *outputs],
            show_progress="hidden",
            trigger_mode="always_last",
            **as_sent,
        )
        tags.select(select, ranked, outputs)
    return page


def launch(page: gr.Blocks, **options: Any) -> str:
    """Serve a page; returns its address. Fonts are the visitor's own: nothing is fetched from elsewhere."""
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    theme.set(body_text_color_subdued="*neutral_500", block_info_text_color="*neutral_500")
    theme.set(  # white text has too little contrast with the theme's own, lighter orange
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_hover_dark="*primary_800",
    )
    return page.launch(theme=theme, css=CSS, max_file_size="20mb", **options)[1]


def main() -> None:
    model = os.environ.get("MODEL_ID", "")
    if not model:
        sys.exit("app: error: MODEL_ID is not set, expected a trained folder or a Hub id")
    try:
        summarizer = pipeline("tag-summarization", model=model, trust_remote_code=True)
    except Exception as error:  # of transformers, safetensors, the Hub: each has its own
        sys.exit(f"app: error: the model {model!r} cannot be loaded: {' '.join(str(error).split())}")
    launch(build(summarizer, Path(model).name))


if __name__ == "__main__":
    main()
