"""What an exported folder is given so that engines ask as it was trained."""

import json
from pathlib import Path

import pytest
from tests.trainer.sft_files import character_tokenizer, template

from weightcast.trainer.config import ConfigContainer
from weightcast.trainer.data.sft.chat_files import end_of_turn, write_chat_files
from weightcast.trainer.peft.leaving import chat_files
from weightcast.trainer.recipes.gemma.gemma3_270m import CHAT_TEMPLATE

IM_END, EOS = "<|im_end|>", "</s>"


def number_of(token: str) -> int:
    return int(character_tokenizer().convert_tokens_to_ids(token))


@pytest.mark.parametrize(("name", "ending"), [("chatml", IM_END), ("headers", "<|eot|>"), ("reasoning", EOS)])
@pytest.mark.parametrize("marked", [False, True])
def test_the_end_of_a_turn(name: str, ending: str, marked: bool) -> None:
    assert end_of_turn(character_tokenizer(), template(name, marked=marked)) == number_of(ending)


def test_a_template_without_an_end() -> None:
    plain = "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
    assert end_of_turn(character_tokenizer(), plain) is None
    assert end_of_turn(character_tokenizer(), "{{ raise_exception('no') }}") is None


@pytest.mark.parametrize("known", [None, 3, [3, 4], "absent"])
def test_the_folder_gets_template_and_ending(known: object, tmp_path: Path) -> None:
    character_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "generation_config.json"
    if known != "absent":
        file.write_text(json.dumps({"eos_token_id": known, "top_k": 5}))
    chatml = template("chatml", marked=False)
    write_chat_files(tmp_path, chatml)
    write_chat_files(tmp_path, chatml)  # once more changes nothing
    fields = json.loads(file.read_text())
    before = {"None": [number_of(EOS)], "absent": [number_of(EOS)], "3": [3], "[3, 4]": [3, 4]}[str(known)]
    assert fields["eos_token_id"] == [*before, number_of(IM_END)]
    assert fields.get("top_k") == (None if known == "absent" else 5)
    assert (tmp_path / "chat_template.jinja").read_text() == chatml


def test_only_a_run_with_a_template_of_its_own_writes_one(tmp_path: Path) -> None:
    config = ConfigContainer()
    config.tokenizer.chat_template = template("chatml", marked=False)
    assert chat_files(config) is None
    config.dataset.kind = "sft"
    write = chat_files(config)
    assert write is not None
    write(tmp_path)  # a folder without a tokenizer has no use for it
    assert list(tmp_path.iterdir()) == []
    config.tokenizer.chat_template = None
    assert chat_files(config) is None


def test_gemmas_template() -> None:
    def render(*roles: str, prompt: bool = False) -> str:
        messages = [{"role": role, "content": f" {role[0]} "} for role in roles]
        text = character_tokenizer(CHAT_TEMPLATE).apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt
        )
        return str(text).replace("<start_of_turn>", "[").replace("<end_of_turn>\n", "]")

    assert render("user", "assistant", "user", prompt=True) == "<s>[user\nu][model\na][user\nu][model\n"
    assert render("system", "user", "assistant") == "<s>[user\ns\n\nu][model\na]"
