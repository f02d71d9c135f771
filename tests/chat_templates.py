"""Chat templates in the styles of published models, each with what makes it hard to render."""

# The system's words inside the first user's message; turns that have to alternate; the BOS token before each.
LLAMA_2 = """
{%- if messages[0]['role'] == 'system' -%}
    {%- set rest = messages[1:] -%}
    {%- set opening = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' -%}
{%- else -%}
    {%- set rest = messages -%}
    {%- set opening = false -%}
{%- endif -%}
{%- for message in rest -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('Roles have to take turns: user, assistant, user and so on') -}}
    {%- endif -%}
    {%- set words = (opening if loop.first and opening else '') + message['content'].strip() -%}
    {%- if message['role'] == 'user' -%}
        {{- bos_token + '[INST] ' + words + ' [/INST]' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- ' ' + words + ' ' + eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""

# A default system message with today's date, defaults for what is not defined, tools that may be none.
LLAMA_3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_words = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_words = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" + system_words + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif message.tool_calls | length == 1 %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {{- message.tool_calls[0].function | tojson + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# Blocks on lines of their own, whose line breaks and indents must not show; a tag that marks the assistant's words.
CHATML = """{% if messages[0]['role'] != 'system' %}
<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}
{% for message in messages %}
    {% if message['role'] == 'assistant' %}
<|im_start|>assistant
        {% generation %}
{{ message['content'] }}<|im_end|>
        {% endgeneration %}
    {% else %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant' }}
{% endif %}
"""

# An end-of-text token in the place of a prompt for the assistant.
PHI_3 = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ '<|system|>\n' + message['content'] + '<|end|>\n' }}"
    "{% elif message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + '<|end|>\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>\n' + message['content'] + '<|end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

# Macros, namespaces, loop controls, JSON that is not ASCII, and content of text or of parts.
GLM = """[gMASK]<sop>
{%- macro words(content) -%}
    {%- if content is string -%}{{ content }}
    {%- else -%}{%- for part in content -%}{%- if part.type == 'text' -%}{{ part.text }}{%- endif -%}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set seen = namespace(users=0, last=-1) -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {%- set seen.users = seen.users + 1 -%}{%- set seen.last = loop.index0 -%}
    {%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {%- if message.role == 'comment' -%}{%- continue -%}{%- endif -%}
    {%- if loop.index0 > seen.last + 1 -%}{%- break -%}{%- endif -%}
<|{{ message.role }}|>
{{ words(message.content) }}
    {%- if message.metadata is defined -%}{{ ' ' + message.metadata | tojson(sort_keys=True) }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{{ '\\n' if seen.users < 9 else '' }}{%- endif -%}
"""

ALL = {"llama-2": LLAMA_2, "llama-3": LLAMA_3, "chatml": CHATML, "phi-3": PHI_3, "glm": GLM}
