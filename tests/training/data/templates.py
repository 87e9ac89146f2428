"""Chat templates of the shapes that published ones have."""

from __future__ import annotations

# ChatML with tools and reasoning, as Qwen3 has it: the last turn alone has its thoughts, or a place for them.
THINKING = """
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for m in messages %}
{%- set content = m.content %}{%- set thought = '' %}
{%- if m.reasoning_content %}{%- set thought = m.reasoning_content %}
{%- elif '</think>' in content %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip() %}
{%- set content = content.split('</think>')[-1].strip() %}{%- endif %}
{{- '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and loop.last %}{{- '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}
{{- content }}
{%- for call in m.tool_calls or [] %}
{{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{- '}\n</tool_call>' }}
{%- endfor %}{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""

# Knows roles and contents, and nothing else.
PLAIN = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] | trim }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

# The same, with the assistant's words marked as what the model generates.
MARKED = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<eos>{% endgeneration %}\n"
    "{% else %}{{ m['content'] }}<eos>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

# Knows contents in parts alone, as vision models' do.
PARTS = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n"
    "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

# Ends no turn.
OPEN = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

# Drops the system's words, and what an assistant thought in its answer, as DeepSeek-R1's does.
FORGETFUL = (
    "{% for m in messages if m['role'] != 'system' %}<|{{ m['role'] }}|>\n"
    "{{ m['content'].split('</think>')[-1] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
