"""The field's terms, one line each, for tooltips. One wording for all pages."""

from __future__ import annotations

TERMS = {
    "TTFT": "Time to first token: from the request's arrival to its first output token.",
    "TPOT": "Time per output token after the first, averaged over one answer.",
    "ITL": "Inter-token latency: the time between two tokens of one stream.",
    "cached tokens": "Prompt tokens whose keys and values were found in the prefix cache and not computed again.",
    "prefill": "Computing the prompt's tokens, many at a time, before the first output token.",
    "decode": "Computing one output token of a running sequence.",
    "step": "One forward pass over a batch that may mix prefill and decode rows.",
    "KV block": "A fixed number of tokens' keys and values; the unit in which cache memory is handed out.",
    "prefix cache": "Blocks of finished or running prompts that a later request with the same beginning can share.",
    "preemption": "A running sequence gave its blocks back because memory ran out; it is computed again later.",
    "queue": "Requests that have arrived and are not running yet.",
    "temperature": "Spread of the choice: 0 always takes the most likely token, 1 samples the model's own distribution.",
    "top_k": "Keep only the k most likely tokens; 0 keeps all.",
    "top_p": "Keep the smallest set of tokens whose probabilities add up to p.",
    "min_p": "Drop tokens that are less likely than this share of the most likely one.",
    "max tokens": "The answer ends after this many output tokens at the latest.",
    "min tokens": "No end of the answer before this many output tokens.",
    "seed": "The same seed, prompt and settings give the same answer. Empty: a new one is drawn for each answer.",
    "stop": "Texts that end the answer, one a line; they are not part of it.",
    "ignore_eos": "Go on when the model says that it is done: for measuring, not for reading.",
    "logprobs": "How many likely alternatives to record for each token; 0 records only the chosen one.",
    "digest": "SHA-256 over the model's files: its identity, whatever it is called.",
    "system prompt": "Instructions that come before the conversation.",
    "memory ledger": "What the engine's bytes on its device are for.",
    "free block": "A block that nobody holds and whose content cannot be matched.",
    "cached block": "A block that nobody holds but whose content a new request may still match.",
}


def tip(term: str) -> str:
    """The explanation of a term. Raises KeyError for a term that has none."""
    return TERMS[term]
