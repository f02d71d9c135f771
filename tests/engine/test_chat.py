import json
import shutil
from datetime import datetime
from types import SimpleNamespace

import pytest
from chat_templates import ALL, CHATML, GLM, LLAMA_2, LLAMA_3
from ranks import run_ranks

from engine import LLM, SamplingParams
from engine.chat import ChatTemplate, plain_messages
from engine.errors import InputError
from engine.shard_writer import write_shards

NOW = datetime(2024, 7, 26, 11, 59)
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict:
    return {"role": "system", "content": text}


CONVERSATIONS = {
    "one message": [user("Who was Ada Lovelace?")],
    "a system message": [system("Be brief."), user("Who?")],
    "turns": [system("  Spaces \n"), user(" é <b> & 'quotes' "), assistant("{{ no template }}\n"), user("日本\n\n")],
    "ends with an answer": [user("6 x 7?"), assistant("42.")],
    "more than role and content": [user("Hi") | {"name": "Zoë", "metadata": {"b": [1, None], "a": "é<"}}],
    "special tokens in the text": [user("</s><s> <|im_end|> [INST]")],
}


def render(source: str, conversation: object, **options) -> str:
    return ChatTemplate(source, TOKENS, "the file").render(conversation, NOW, **options)


def refused(source: str, message: str, conversation: object = (user("Hi"),)) -> None:
    with pytest.raises(InputError, match=message) as caught:
        render(source, list(conversation))
    assert "\n" not in str(caught.value)


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A model without a template."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def edit_config(folder, **changes) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class TestText:
    @pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
    @pytest.mark.parametrize("style", ALL)
    @pytest.mark.parametrize("prompt", [True, False])
    def test_is_that_of_transformers(self, folder, style, conversation, prompt, monkeypatch):
        transformers = pytest.importorskip("transformers")
        from transformers.utils import chat_template_utils

        (folder / "chat_template.jinja").write_text(ALL[style])
        monkeypatch.setattr(chat_template_utils, "datetime", SimpleNamespace(now=lambda: NOW))
        chat_template_utils._compile_jinja_template.cache_clear()
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        options = {"add_generation_prompt": prompt}
        expected = theirs.apply_chat_template(conversation, tokenize=False, **options)
        assert ChatTemplate.from_folder(folder).render(conversation, NOW, **options) == expected
        assert expected

    def test_to_the_letter(self):
        conversation = [system("Be brief."), user("One?"), assistant("1"), user("Two?")]
        assert render(LLAMA_2, conversation) == (
            "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nOne? [/INST] 1 </s><s>[INST] Two? [/INST]"
        )
        assert render(CHATML, conversation[1:3]) == (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n"
            "<|im_start|>assistant\n1<|im_end|>\n<|im_start|>assistant\n"
        )
        assert "Today Date: 26 Jul 2024\n" in render(LLAMA_3, conversation)
        metadata = user("Hi") | {"metadata": {"b": 1, "a": "é<&"}}
        assert render(GLM, [metadata], add_generation_prompt=False) == '[gMASK]<sop><|user|>\nHi {"a": "é<&", "b": 1}'

    def test_parts_are_joined(self):
        parts = [{"type": "text", "text": "6 x "}, {"type": "text", "text": "7?"}]
        for source in ALL.values():
            assert render(source, [{"role": "user", "content": parts}]) == render(source, [user("6 x 7?")])

    def test_what_is_not_defined_is_empty(self):
        assert render("{{ pad_token }}{{ tools is none }}{{ documents is none }}", [user("x")]) == "TrueTrue"

    def test_messages_are_given_as_a_copy(self):
        conversation = [user("x") | {"tags": ["a"]}]
        source = "{% set _ = dict.update(messages[0], {'role': 'other'}) %}{{ messages[0].role }}"
        assert render(source, conversation) == "other"
        assert conversation == [user("x") | {"tags": ["a"]}]


class TestFinding:
    def render(self, folder) -> str:
        return ChatTemplate.from_folder(folder).render([user("x")], NOW)

    def test_where_it_may_be(self, folder):
        named = {"tool_use": "one of several", "default": "the default"}
        edit_config(folder, chat_template=[{"name": name, "template": text} for name, text in named.items()])
        assert self.render(folder) == "the default"
        edit_config(folder, chat_template="in the config")
        assert self.render(folder) == "in the config"
        (folder / "chat_template.jinja").write_text("é in a file\n")
        assert self.render(folder) == "é in a file"

    def test_special_tokens_of_either_file_and_spelling(self, folder):
        edit_config(folder, bos_token={"content": "<B>"}, image_token="<I>", eos_token=None, add_bos_token=True)
        (folder / "special_tokens_map.json").write_text('{"bos_token": "old", "unk_token": "<U>"}')
        (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ unk_token }}{{ image_token }}{{ eos_token }}.")
        assert self.render(folder) == "<B><U><I>."

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (None, "has no chat template, neither chat_template.jinja nor chat_template in tokenizer_config.json; use"),
            (7, "tokenizer_config.json: chat_template is a int; accepted: text"),
            ([], "has chat templates named nothing; accepted: one named default"),
            ([{"name": "rag", "template": "x"}, {"name": "tool_use"}], "named rag, tool_use; accepted: one named def"),
            ([{"name": "default", "template": 7}], "chat_template is a int"),
            ([7, {"name": ["default"], "template": "x"}], r"named \['default'\]; accepted: one named default"),
        ],
    )
    def test_none_to_use(self, folder, value, message):
        edit_config(folder, chat_template=value)
        with pytest.raises(InputError, match=message):
            ChatTemplate.from_folder(folder)
        (folder / "tokenizer_config.json").unlink()
        with pytest.raises(InputError, match="has no chat template"):
            ChatTemplate.from_folder(folder)

    def test_a_file_that_is_no_text(self, folder):
        (folder / "chat_template.jinja").write_bytes(b"\xff\xfe{{ x }}")
        with pytest.raises(InputError, match="chat_template.jinja is not UTF-8 text"):
            ChatTemplate.from_folder(folder)


class TestBadTemplates:
    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("\n\n{% if %}", "the file: line 3 of the chat template does not parse: Expected an expression"),
            ("{{ x | nowhere }}", "line 1 of the chat template does not parse: No filter named 'nowhere'"),
            ("{% for x in y %}", "does not parse"),
            ("{{" + "(" * 5000 + "1" + ")" * 5000 + "}}", "the chat template does not compile: maximum recursion"),
        ],
    )
    def test_that_do_not_parse(self, source, message):
        refused(source, message)

    def test_that_refuse_say_why(self):
        refused(LLAMA_2, "the chat template refuses the messages: Roles have to take turns", [assistant("x")])
        refused("{{ raise_exception('two\n\n lines ' + 'x' * 999) }}", "refuses the messages: two lines x{290}$")
        refused("{{ raise_exception() }}", "the chat template fails")

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("{{ nothing.at.all }}", "the chat template fails: 'nothing' is undefined"),
            ("{{ 'a' + 1 }}", "the chat template fails: can only concatenate"),
            ("{{ 1 / 0 }}", "division by zero"),
            ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth"),
            ("{{ range(10**9) }}", "Range too big"),
        ],
    )
    def test_that_fail(self, source, message):
        refused(source, message)

    @pytest.mark.parametrize(
        "source",
        [
            "{% for i in range(99999) %}{% for j in range(99999) %}0123456789{% endfor %}{% endfor %}",
            "{{ 'x' * 10**12 }}",
            "{{ 10**12 * 'x' }}",
            "{{ ([0] * 10**9) | length }}",
            "{{ 10**10**10 }}",
        ],
    )
    def test_that_would_not_end_or_fill_the_memory(self, source):
        refused(source, "the chat template makes more than 16,777,216 characters of the messages; accepted")

    def test_arithmetic_that_is_small_is_done(self):
        source = "{{ 2**10 * 1.5 }} {{ 2 * 'ab' }} {{ [1] * 2 }} {{ 'ab' * -1 }} {{ 10**9 * 10**9 }}"
        assert render(source, [user("x")]) == f"1536.0 abab [1, 1]  {10**18}"

    @pytest.mark.parametrize(
        "source",
        [
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "{{ ''['__class__'] }}",
            "{{ '{0.__class__.__mro__}'.format('') }}",
            "{{ cycler.__init__.__globals__ }}",
            "{{ raise_exception.__globals__ }}",
            "{{ strftime_now.__self__ }}",
            "{{ messages.append(1) }}",
            "{{ messages[0].update(role='x') }}",
            "{% set ns = namespace() %}{% set ns.__call__ = 1 %}",
            "{{ namespace(__class__=1) }}",
            "{{ namespace({'__html__': 1}) }}",
            "{% include '/etc/passwd' %}",
        ],
    )
    def test_nothing_leads_out_of_the_sandbox(self, source):
        try:
            text = render(source, [user("x")])
        except InputError as error:
            assert "the chat template" in str(error)
        else:
            assert text == ""  # undefined


class TestMessages:
    @pytest.mark.parametrize(
        ("messages", "message"),
        [
            ("Hi", 'messages are a str; accepted: a list of {"role": "user", "content": "text"}'),
            (None, "messages are a NoneType"),
            (user("Hi"), "messages are a dict"),
            ([], "messages are empty"),
            (["Hi"], "message 0 is a str"),
            ([user("Hi"), ["Hi"]], "message 1 is a list"),
            ([{"content": "Hi"}], "message 0 has no role"),
            ([{"role": "user"}], "message 0 has no content"),
            ([{"role": 7, "content": "Hi"}], "message 0: role is 7; accepted: text"),
            ([{"role": "user", "content": None}], "message 0: content is None; accepted: text, or a list of text"),
            ([{"role": "user", "content": {"text": "Hi"}}], "message 0: content is {"),
            ([{"role": "user", "content": ["Hi"]}], "message 0: content holds 'Hi'; accepted"),
            ([{"role": "user", "content": [{"type": "image_url"}]}], "content holds {'type': 'image_url'"),
            ([{"role": "user", "content": [{"type": "text"}]}], "content holds"),
            ([user("Hi") | {"file": open}], "message 0 holds what is not JSON"),
        ],
    )
    def test_mistakes(self, messages, message):
        with pytest.raises(InputError, match=message.replace("{", r"\{")):
            plain_messages(messages)

    def test_roles_are_the_templates_affair(self):
        assert "<|im_start|>critic\nHm" in render(CHATML, [{"role": "critic", "content": "Hm"}])


GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)


@pytest.fixture(scope="module")
def chat_folder(tiny_folder, tmp_path_factory):
    folder = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("chat") / "model")
    edit_config(folder, chat_template=LLAMA_2)
    return folder


@pytest.fixture(scope="module")
def llm(chat_folder):
    return LLM(chat_folder, device="cpu")


class TestLLM:
    def test_the_text_is_encoded_as_it_is(self, llm):
        (output,) = llm.chat(CONVERSATIONS["one message"], GREEDY)
        assert output.prompt == "<s>[INST] Who was Ada Lovelace? [/INST]"
        assert output.prompt_token_ids == llm.tokenizer.encode(output.prompt, add_special_tokens=False)
        assert list(output.prompt_token_ids).count(llm.tokenizer.bos_token_id) == 1
        (expected,) = llm.generate([output.prompt_token_ids], GREEDY)
        assert output.outputs == expected.outputs

    def test_token_ids_are_those_of_transformers(self, llm, chat_folder):
        transformers = pytest.importorskip("transformers")
        theirs = transformers.AutoTokenizer.from_pretrained(chat_folder)
        for conversation in CONVERSATIONS.values():
            expected = theirs.apply_chat_template(conversation, return_dict=False)
            assert llm.chat(conversation, GREEDY)[0].prompt_token_ids == expected

    def test_a_list_of_conversations(self, llm):
        conversations = [[system("Be brief."), user("One?")], [user("Two?")]]
        outputs = llm.chat(conversations, [GREEDY, SamplingParams(n=2, max_tokens=3)], disable_hierarchy=True)
        assert [len(output.outputs) for output in outputs] == [1, 2]
        assert outputs[0] == llm.chat(conversations[0], GREEDY)[0]
        assert outputs[1].prompt == "<s>[INST] Two? [/INST]"

    def test_without_the_prompt_for_an_answer(self, llm, monkeypatch):
        monkeypatch.setattr(llm, "_chat_template", ChatTemplate(CHATML, TOKENS, "f"))
        prompts = [llm.chat([user("x")], GREEDY, add_generation_prompt=add)[0].prompt for add in (True, False)]
        assert prompts[0] == prompts[1] + "<|im_start|>assistant\n"

    def test_ranks_agree_on_the_time(self, chat_folder, tmp_path, monkeypatch):
        folder = shutil.copytree(chat_folder, tmp_path / "model")
        (folder / "chat_template.jinja").write_text("{{ strftime_now('%f') }}{{ messages[0].content }}")
        write_shards(folder, tmp_path / "shards", 2, model_name="tiny")  # the template comes with them

        def chat(group):
            return LLM(folder, tp_dir=tmp_path / "shards", group=group).chat([user("x")], GREEDY)[0]

        first, second = run_ranks(2, chat)
        assert first == second and len(first.prompt) == 7

    @pytest.mark.parametrize(
        ("conversations", "message"),
        [
            ("Hi", "conversations are a str; accepted"),
            (user("Hi"), "conversations are a dict"),
            (7, "conversations are a int"),
            ([], "messages are empty"),
            ([[user("Hi")], []], "conversation 1: messages are empty"),
            ([[user("Hi")], "Hi"], "conversation 1: messages are a str"),
            ([user("Hi"), [user("Hi")]], "message 1 is a list"),
            ([[user("Hi")], [assistant("Hi")]], "conversation 1: .*: the chat template refuses the messages: Roles"),
            ([user("\udcff")], "a prompt is not Unicode text"),
        ],
    )
    def test_mistakes(self, llm, conversations, message):
        with pytest.raises(InputError, match=message):
            llm.chat(conversations, GREEDY)

    def test_a_model_that_cannot_chat(self, tiny_folder):
        with pytest.raises(InputError, match="has no chat template"):
            LLM(tiny_folder, device="cpu").chat([user("Hi")])
        with pytest.raises(InputError, match="random weights of a preset have no chat template"):
            LLM("tiny", load_format="dummy", device="cpu").chat([user("Hi")])
