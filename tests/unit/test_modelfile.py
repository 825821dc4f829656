"""The Go templates of a Modelfile give the text that the Jinja templates of the training give."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

from llama_lab.config import GenerationSettings
from llama_lab.data.templates import TEMPLATE_NAMES, read_template
from llama_lab.take.modelfile import go_template, modelfile, template_name

RENDER = """\
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

// As Ollama does it: a template with .Messages once, one with .Response for each pair and cut at the last answer.
type Case struct {
	Template, System string
	Pairs            [][2]string
}

func main() {
	var cases []Case
	var texts []string
	json.NewDecoder(os.Stdin).Decode(&cases)
	for _, c := range cases {
		t := template.Must(template.New("").Parse(c.Template))
		var out strings.Builder
		if strings.Contains(c.Template, ".Messages") {
			var messages []map[string]string
			for _, pair := range c.Pairs {
				messages = append(messages, map[string]string{"Role": "user", "Content": pair[0]})
				if pair[1] != "" {
					messages = append(messages, map[string]string{"Role": "assistant", "Content": pair[1]})
				}
			}
			t.Execute(&out, map[string]any{"System": c.System, "Messages": messages})
		} else {
			system := c.System
			for _, pair := range c.Pairs {
				var part strings.Builder
				answer := pair[1]
				if answer == "" && !strings.Contains(c.Template, "if .Response") {
					answer = "\\x00"
				}
				t.Execute(&part, map[string]any{"System": system, "Prompt": pair[0], "Response": answer})
				out.WriteString(strings.Split(part.String(), "\\x00")[0])
				system = ""
			}
		}
		texts = append(texts, out.String())
	}
	json.NewEncoder(os.Stdout).Encode(texts)
}
"""

CHATS = [
    (None, [("How do I fly?", "")]),
    ("Be short.", [("How do I fly?", "")]),
    ("Be short.", [("How do I fly?", "Flap."), ("And land?", "Stop."), ("Thanks", "")]),
    (None, [("One\n\nquestion", "An answer."), ("Another", "")]),
]


def chat(system, pairs):
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in pairs:
        messages.append({"role": "user", "content": question})
        messages += [{"role": "assistant", "content": answer}] * bool(answer)
    return messages


@pytest.mark.skipif(shutil.which("go") is None, reason="needs Go")
@pytest.mark.parametrize("name", TEMPLATE_NAMES)
def test_go_template_writes_what_the_training_read(tiny_tokenizer, tmp_path, name):
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = read_template(name)
    bos, eos = ("", "<|im_end|>") if name == "chatml" else (tokenizer.bos_token, tokenizer.eos_token)
    text = go_template(name, eos, bos)
    cases = [{"Template": text, "System": system or "", "Pairs": pairs} for system, pairs in CHATS]
    (tmp_path / "render.go").write_text(RENDER)
    words = ["go", "run", str(tmp_path / "render.go")]
    done = subprocess.run(words, input=json.dumps(cases), capture_output=True, text=True, check=True)
    for (system, pairs), given in zip(CHATS, json.loads(done.stdout), strict=True):
        wanted = tokenizer.apply_chat_template(chat(system, pairs), tokenize=False, add_generation_prompt=True)
        assert bos + given == wanted


@pytest.mark.parametrize("name", TEMPLATE_NAMES)
def test_every_shipped_template_has_a_go_template(tiny_tokenizer, tmp_path, name):
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = read_template(name)
    found = template_name(tokenizer)
    assert go_template(found, "</s>", "<s>") == go_template(name, "</s>", "<s>")
    text = modelfile(tmp_path / "my.gguf", tokenizer, GenerationSettings(), "Be short.")
    assert "FROM ./my.gguf\nTEMPLATE" in text
    assert 'PARAMETER stop "</s>"' in text
    assert 'SYSTEM """Be short."""' in text


def test_a_template_of_its_own_is_left_to_the_gguf(tiny_tokenizer, tmp_path):
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{{ messages }}"
    assert "TEMPLATE" not in modelfile(tmp_path / "my.gguf", tokenizer, GenerationSettings(), None)
