"""How a model's format is found, and that calls survive the way into the model's template and out of its output."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from engine.config import REASONING_PARSERS, TOOL_CALL_PARSERS
from engine.errors import ConfigError, InvalidRequestError
from engine.tokenizer import Tokenizer
from workbench.chat_output import gather, make_output_parser, output_syntax
from workbench.chat_output.formats import CALL_FORMATS, find_call_format
from workbench.chat_output.reasoning import MISTRAL, THINK
from workbench.chat_output.syntax import find_reasoning
from workbench.settings import bundled_model

TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}}},
    {"type": "function", "function": {"name": "time", "parameters": {}}},
]  # fmt: skip
# In the manner of the models' own templates: how tools, calls and results are written.
HERMES = """{%- if tools %}<|im_start|>system
<tools>{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
</tools> Answer with <tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>
{% endif %}
{%- for m in messages %}
{%- if m.role == "tool" %}<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
{% else %}<|im_start|>{{ m.role }}
{% if m.reasoning_content is defined %}<think>
{{ m.reasoning_content }}
</think>

{% endif %}{{ m.content }}{% for call in m.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% elif opens_reasoning is defined %}<think>
{% endif %}{% endif %}"""
LLAMA = """{%- if tools %}<|im_start|>system
Answer in the format {"name": function name, "parameters": dictionary of argument name and its value}.
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ "ipython" if m.role == "tool" else m.role }}
{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception("one call at once") }}{% endif %}
{%- set call = m.tool_calls[0].function %}{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}
{%- else %}{{ m.content }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
MISTRAL_V3 = """{%- for m in messages %}
{%- if m.role == "user" %}{% if loop.last and tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST] {{ m.content }}[/INST]
{%- elif m.role == "tool" %}[TOOL_RESULTS] {"content": {{ m.content | tojson }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]
{%- elif m.tool_calls %}[TOOL_CALLS] [{% for call in m.tool_calls %}
{%- if call.id | length != 9 %}{{ raise_exception("ids have 9 letters and digits") }}{% endif -%}
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}, "id": "{{ call.id }}"}
{%- if not loop.last %}, {% endif %}{% endfor %}]
{%- else %} {{ m.content }}{% endif %}{% endfor %}"""
MISTRAL_V11 = """{%- for m in messages %}{% if m.role == "user" %}[INST]{{ m.content }}[/INST]
{%- for call in m.tool_calls or [] %}{% endfor %}{% elif m.role == "tool" %}[TOOL_RESULTS]{{ m.tool_call_id }}[TOOL_CONTENT]{{ m.content }}[/TOOL_RESULTS]
{%- else %}{{ m.content }}{% for call in m.tool_calls or [] %}[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}{% endfor %}
{%- endif %}{% endfor %}"""
QWEN_CODER = """{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for call in m.tool_calls or [] %}
<tool_call>
<function={{ call.function.name }}>
{% for name, value in call.function.arguments.items() %}<parameter={{ name }}>
{{ value if value is string else value | tojson }}
</parameter>
{% endfor %}</function>
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
PYTHONIC = """{%- if tools %}Answer with [func_name1(params_name1=params_value1, ...), func_name2(params)]
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.tool_calls %}[{% for call in m.tool_calls %}{{ call.function.name }}({% for name, value in call.function.arguments.items() %}
{{- name }}={{ value | tojson }}{% if not loop.last %}, {% endif %}{% endfor %}){% if not loop.last %}, {% endif %}{% endfor %}]
{%- else %}{{ m.content }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TEMPLATES = [
    (HERMES, "hermes"), (LLAMA, "llama3_json"), (MISTRAL_V3, "mistral"), (MISTRAL_V11, "mistral"), (QWEN_CODER, "qwen3_coder"),
    (PYTHONIC, "pythonic"),
]  # fmt: skip
MARKERS = ["<|im_start|>", "[TOOL_CALLS]", "[INST]", "[/INST]", "<think>", "</think>"]
USER = {"role": "user", "content": "Weather?"}


def tokenizer_with(template: str | dict[str, str], special: list[str] = MARKERS[:4]) -> Tokenizer:
    """Bytes as tokens, some markers as single ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rust = RustTokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    wrapper = PreTrainedTokenizerFast(
        tokenizer_object=rust, eos_token="<|im_end|>", additional_special_tokens=special
    )
    wrapper.add_tokens(MARKERS[4:])
    wrapper.chat_template = template
    return Tokenizer(wrapper)


@pytest.mark.parametrize(
    ("template", "name", "num_calls"),
    [(template, name, n) for template, name in TEMPLATES for n in (1, 2) if (name, n) != ("llama3_json", 2)],
)  # Llama 3's template takes one call a message
def test_a_conversation_with_calls_goes_through_the_template_and_back(
    template: str, name: str, num_calls: int
) -> None:
    """What the template writes for an assistant's call is what the model learned to write: it is read as that call."""
    tokenizer = tokenizer_with(template)
    assert find_call_format(tokenizer) == name
    called = [("weather", {"city": 'Ulm "Süd"', "days": 3}), ("time", {})][:num_calls]
    calls = [
        {"id": f"call0000{i}", "type": "function", "function": {"name": n, "arguments": json.dumps(a)}}
        for i, (n, a) in enumerate(called)
    ]
    prompt = tokenizer.apply_chat_template([USER], tools=TOOLS)
    ids = tokenizer.apply_chat_template(
        [USER, {"role": "assistant", "content": None, "tool_calls": calls}],
        tools=TOOLS,
        add_generation_prompt=False,
    )
    text = tokenizer.decode(ids, skip_special_tokens=False)
    start = tokenizer.decode(prompt, skip_special_tokens=False)
    output = text.removeprefix(start) if text.startswith(start) else text[text.index("[TOOL_CALLS]") :]
    parser = make_output_parser(tokenizer, prompt, TOOLS)
    found = gather(parser.push(output.removesuffix("\n").removesuffix("<|im_end|>")) + parser.finish())
    assert [(call.name, json.loads(call.arguments)) for call in found.calls] == called
    assert found.content == ""

    mine = {"role": "assistant", "content": found.content, "tool_calls": [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in found.calls
    ]}  # fmt: skip
    results = [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in found.calls]
    told = tokenizer.decode(tokenizer.apply_chat_template([USER, mine, *results], tools=TOOLS), False)
    assert told.count("sunny") == num_calls
    assert told[: len(text) - len("\n")].count("weather") == text.count("weather")


def test_the_bundled_model_has_a_format_of_its_own() -> None:
    tokenizer = Tokenizer.from_pretrained(bundled_model())
    syntax = output_syntax(tokenizer, tools=TOOLS)
    assert syntax.calls is CALL_FORMATS["quire"]
    assert (syntax.shows_special_tokens, syntax.reasoning) == (True, None)
    assert output_syntax(tokenizer).is_plain


def test_a_format_can_be_named_and_names_are_the_engines() -> None:
    assert (
        output_syntax(tokenizer_with("{{ messages }}"), tools=TOOLS).calls is CALL_FORMATS["mistral"]
    )  # by its token
    tokenizer = tokenizer_with("{{ messages }}", special=[])
    assert output_syntax(tokenizer, tools=TOOLS).calls is None
    assert output_syntax(tokenizer, tools=TOOLS, tool_call_parser="hermes").calls is CALL_FORMATS["hermes"]
    assert find_reasoning(tokenizer, "mistral") is MISTRAL
    assert sorted(CALL_FORMATS) == sorted(TOOL_CALL_PARSERS)
    for name in REASONING_PARSERS:
        find_reasoning(tokenizer, name)
    from engine.config import EngineConfig

    with pytest.raises(ConfigError, match="hermes2"):
        EngineConfig(model="x", tool_call_parser="hermes2")


def test_reasoning_is_known_by_the_template_and_open_where_the_prompt_opened_it() -> None:
    tokenizer = tokenizer_with({"default": HERMES, "tool_use": LLAMA})  # all of a model's templates count
    asked = output_syntax(tokenizer, tokenizer.apply_chat_template([USER]))
    assert (asked.reasoning, asked.is_open, asked.shows_special_tokens) == (THINK, False, False)
    opened = tokenizer.apply_chat_template([USER], chat_template_kwargs={"opens_reasoning": True})
    assert output_syntax(tokenizer, opened).is_open
    closed = tokenizer.apply_chat_template([USER], chat_template_kwargs={"enable_thinking": False})
    assert not output_syntax(tokenizer, closed).is_open
    assert output_syntax(tokenizer, opened, reasoning_parser="none").is_plain
    counter = output_syntax(tokenizer, opened).reasoning_tokens()
    assert counter is not None
    counter.push(tokenizer.encode("abc</think>de<think>f"))
    assert counter.count == 3


def test_an_assistants_reasoning_is_the_templates_to_show() -> None:
    said = {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}
    tokenizer = tokenizer_with(HERMES)
    text = tokenizer.decode(tokenizer.apply_chat_template([USER, said, USER]), False)
    assert "<think>\nHm.\n</think>\n\nYes." in text


def test_what_the_renderer_sets_is_no_template_variable() -> None:
    with pytest.raises(InvalidRequestError, match="tokenize") as caught:
        tokenizer_with(HERMES).apply_chat_template([USER], chat_template_kwargs={"tokenize": True})
    assert caught.value.param == "chat_template_kwargs.tokenize"
