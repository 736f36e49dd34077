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
    "presence_penalty": "Taken from the logit of every token that the answer has; below 0 it is encouraged.",
    "frequency_penalty": "Taken from a token's logit for each time that the answer has it.",
    "repetition_penalty": "Above 1 makes tokens of prompt and answer less likely, below 1 more likely.",
    "logit_bias": "Added to the logits of single tokens, by id: -100 forbids one, 100 forces it.",
    "bad_words": "Words that the answer must not hold, one a line.",
    "seed": "The same seed, prompt and settings give the same answer. Empty: a new one is drawn for each answer.",
    "stop": "Texts that end the answer, one a line; they are not part of it.",
    "ignore_eos": "Go on when the model says that it is done: for measuring, not for reading.",
    "logprobs": "How many likely alternatives to record for each token; 0 records only the chosen one.",
    "structured output": "The engine lets the model choose only tokens with which the output can still become what is asked for.",
    "tools": "Functions that the model may call, as a JSON list of OpenAI's definitions; you answer its calls.",
    "digest": "SHA-256 over the model's files: its identity, whatever it is called.",
    "system prompt": "Instructions that come before the conversation.",
    "memory ledger": "What the engine's bytes on its device are for.",
    "free block": "A block that nobody holds and whose content cannot be matched.",
    "cached block": "A block that nobody holds but whose content a new request may still match.",
    "E2E": "End to end: from the request's arrival to its last output token.",
    "alias": "A name that points at one version, such as champion; moving it changes what is served, not the weights.",
    "lineage": "What a version was made of: its base, its adapter, and the run that made it.",
    "promote": "Point the alias at this version. A running engine that follows the alias swaps to it; old streams end on the old one.",
    "roll back": "Point the alias back at the version that it named before.",
    "closed loop": "A fixed number of users: each sends its next request when the last one was answered.",
    "open loop": "Requests arrive at random times of a fixed rate, whether or not earlier ones were answered.",
    "SLO": "Service level objective: the latency that a request must keep to count.",
    "goodput": "Requests a second that kept the SLO.",
    "share of limit": "The least time that this machine could take for the same work, by the time it took. Of each step: "
    "max(weight bytes ÷ bandwidth, operations with weights ÷ matrix rate) + max(KV bytes ÷ bandwidth, attention operations ÷ "
    "matrix rate); bandwidth and matrix rate are measured on this machine.",
    "lateness": "How much later than planned the generator sent a request; high values mean that it, not the server, was slow.",
    "paired interval": "95 % interval of the mean difference on the same examples, by bootstrap: 0 outside of it is a proven difference.",
    "proven": "The 95 % interval of the difference does not contain 0.",
    "p-value": "The chance of a difference this large if the versions were equal.",
    "detectable effect": "The smallest true difference that this many examples would show in 8 of 10 tries.",
    "examples needed": "How many examples in all would prove the difference that was seen, in 8 of 10 tries.",
    "slice": "A named part of the data set, judged for itself with its interval widened for the number of slices.",
    "verdict": "Promote: better and no rule broken. Not proven: could be chance. Refuse: a rule is broken.",
    "gate": "Rules that a candidate has to keep before its alias may move.",
    "interrupted": "The app or the machine stopped under the job; what it had stored is kept.",
    "schedule": "When a notebook runs by itself: a cron line, an interval, or once.",
    "parameters": "The values of a notebook's first tagged cell; a run replaces them.",
}


def tip(term: str) -> str:
    """The explanation of a term. Raises KeyError for a term that has none."""
    return TERMS[term]
