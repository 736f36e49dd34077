"""The model card of an exported demo model: every number comes from its figures, only the prose is here."""

from __future__ import annotations

from typing import Any

from workbench.versions.demo.corpus import DOMAINS

_FAMILY_NOTES = {
    "cited_answer": "states the fact and cites exactly its passage",
    "not_in_context": "says that the context lacks it",
    "tool_call": "tool name and all arguments exactly right",
    "tool_answer": "states every value of the tool's result",
    "no_tool": "says that no listed tool fits",
    "copy": "repeats names, codes and phrases exactly",
    "spell": "letters in order",
    "count": "number of entries of a list (2 to 10)",
    "pick": "the n-th or last entry of a list",
    "sentence": "one sentence holds all four given words",
    "identity": "says what it is and what it is for",
    "story": "a story holds all three given words (dev stories)",
}
_DOMAIN_NOTES = {
    "story": ("children's stories with required words", "CC BY and CDLA-Sharing 1.0"),
    "persona": ("persona chats", "CC BY 4.0"),
    "topical": ("open-domain chats", "CDLA-Sharing 1.0"),
    "tm4": ("coffee-shop chats with JSON tool calls", "CC BY 4.0"),
}


def write_card(figures: dict[str, Any], num_chips: int) -> str:
    """Markdown with front matter. `figures` is what `export` writes to figures.json."""
    training, evaluation = figures["training"], figures["evaluation"]
    return "\n".join(
        [
            *_head(figures, training),
            *_scores(evaluation),
            *_perplexity(evaluation["perplexity"]),
            *_limits(num_chips),
            *_data(),
        ]
    )


def _head(figures: dict[str, Any], training: dict[str, Any]) -> list[str]:
    measured = figures["measured_with"]
    return [
        "---",
        "license: apache-2.0",
        "language: en",
        "---",
        "# chat-base: Quire's bundled demo model",
        "",
        f"A Llama-architecture model of {figures['parameters'] / 1e6:.1f} million parameters (vocabulary 4,096, hidden "
        "256, 8 layers, 4 heads of 64, 2 KV heads, intermediate 704, tied embeddings, bf16 weights), trained from random "
        "weights by this project. It exists so that a fresh clone can serve, watch, evaluate and fine-tune a real model "
        "without a download or a GPU.",
        "",
        "It was trained on short tasks whose answers can be checked: questions over a given context with citations, tool "
        "calls, copying, spelling, counting, sentences and stories with required words. Names, codes and numbers were drawn "
        "at random, so that only copying can answer. How far it got is in the table below: some families it barely knows. "
        "Turning a message into a JSON record was left out: fine-tunes bring that.",
        "",
        "## Training",
        "",
        f"- {training['tokens'] / 1e6:.2f} million tokens, {training['answer_tokens'] / 1e6:.2f} million of them answers; the "
        f"loss is on answers only. {training['step']:,} steps; Muon (rate {training['muon_lr']:g}) for the layers' matrices, "
        f"AdamW (rate {training['peak_lr']:g}) for the rest; warm-up, constant, linear decay.",
        f"- {training['wall_s'] / 60:.0f} minutes in {training['dtype']} on {training['hardware']}.",
        "- The mix: generated tasks (`workbench/versions/demo`), first mostly copying, then all families, and the dialogues "
        "below, which are about a tenth of the tokens of the full mix.",
        *([f"- {figures['note']}"] if figures["note"] else []),
        f"- Seed {training['seed']}; torch {measured['torch']}, transformers {measured['transformers']}, Python "
        f"{measured['python']}. Again: `python -m workbench.versions.demo.train --data DIALOGUES --out DIR`.",
        "",
    ]


def _scores(evaluation: dict[str, Any]) -> list[str]:
    known = evaluation["scores_new_values"]
    rows = [
        f"| {family} | {_FAMILY_NOTES[family]} | {_rate(known[family]) if family in known else '–'} | {_rate(score)} |"
        for family, score in evaluation["scores"].items()
    ]
    return [
        "## Held-out tasks",
        "",
        "Greedy answers: passed/asked, rate, 95 % Wilson interval. Values (names, codes, numbers, nouns) are ones that "
        "training never saw; in the last column neither are the phrasings, tool names and system prompts.",
        "",
        "| family | passes when the answer | new values, known phrasings | new values, new phrasings |",
        "|---|---|---|---|",
        *rows,
        "",
    ]


def _rate(score: dict[str, Any]) -> str:
    rate = 100 * score["passed"] / score["total"]
    return f"{score['passed']}/{score['total']}, {rate:.1f} % ({100 * score['low']:.1f} to {100 * score['high']:.1f})"


def _perplexity(perplexities: dict[str, float]) -> list[str]:
    rows = [f"| {domain} | {_DOMAIN_NOTES[domain][0]} | {perplexities[domain]:.2f} |" for domain in DOMAINS]
    return [
        "## Held-out perplexity",
        "",
        "Per token of this tokenizer, answers only, on the dev part of each dialogue set.",
        "",
        "| domain | what | perplexity |",
        "|---|---|---|",
        *rows,
        "",
    ]


def _limits(num_chips: int) -> list[str]:
    return [
        "## What it cannot do",
        "",
        "- It knows next to nothing about the world, cannot calculate, reason or write code, and English is its only language.",
        "- It knows the formats that it was trained on; other phrasings of the same task often fail.",
        "- The context may hold 2,048 tokens, but training saw 1,280 at most and mostly under 300.",
        "- Open conversation and stories rarely make sense. Nothing in it was made safe for the public.",
        "",
        f"`prompt_chips.json` holds {num_chips} held-out tasks that these weights pass greedily; they were chosen for that "
        "and are a showcase, not a score. `figures.json` holds the numbers above.",
        "",
    ]


def _data() -> list[str]:
    rows = [f"| {domain} | {what} | {licence} |" for domain, (what, licence) in _DOMAIN_NOTES.items()]
    return [
        "## Data, licences, attribution",
        "",
        "The weights are under Apache-2.0. The dialogue data is not part of the project; sources and changes: `data/README.md`.",
        "",
        "| set | what | licence |",
        "|---|---|---|",
        *rows,
        "",
        "- persona: Synthetic-Persona-Chat, Google Research (google-research-datasets/Synthetic-Persona-Chat).",
        "- tm4: Taskmaster-4, Google Research (google-research-datasets/Taskmaster).",
        "- topical: Topical-Chat, Amazon (alexa/Topical-Chat).",
        "- story: African Storybook and other storybooks (global-asp/asp-source, global-asp/pb-source; the non-commercial "
        "ones left out) and about 0.9 MB of TinyStories.",
        "",
    ]
