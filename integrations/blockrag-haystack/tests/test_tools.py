"""Tools: a tiny model that learned by heart when to call one, used by Haystack's own Agent."""

from dataclasses import asdict

import pytest
import torch
from haystack.components.agents import Agent
from haystack.dataclasses import ChatMessage, ToolCall
from haystack.tools import Tool
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from blockrag import BlockModel
from blockrag.demo import checkpoint_path
from blockrag.model.facts import BlockAttentionFacts
from blockrag.model.shared import register_model
from blockrag.prompt.chat import segment_chat
from haystack_integrations.components.generators.blockrag import BlockRAGChatGenerator
from haystack_integrations.components.generators.blockrag.conversation import to_messages

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Thimphu"}}\n</tool_call>'
# Shows tools and calls as Hermes and Qwen do.
CHAT_TEMPLATE = (
    "{% if tools %}Tools: {% for tool in tools %}{{ tool.function.name }} {% endfor %}\n{% endif %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "<tool_call>{{ call.function.name }} {{ call.function.arguments | tojson }}</tool_call>{% endfor %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def weather(city: str) -> str:
    """The weather of a city."""
    return f"Sunny in {city}"


TOOL = Tool(
    name="weather",
    description="The weather of a city.",
    parameters={"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    function=weather,
)
QUESTION = [ChatMessage.from_user("How is the weather?")]


@pytest.fixture(scope="module")
def arguments():
    """The model's: it knows two prompts, and answers the question by a call and the tool's result by a sentence."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path())
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(checkpoint_path())
    config.num_hidden_layers = 2
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    made = BlockModel(model, tokenizer, facts=BlockAttentionFacts(block_fine_tuned=True))
    call = ToolCall("weather", {"city": "Thimphu"}, id="1")
    said = [ChatMessage.from_assistant(tool_calls=[call]), ChatMessage.from_tool("Sunny in Thimphu", origin=call)]
    spec = {"type": "function", "function": TOOL.tool_spec}
    rows = []
    for messages, answer in zip((QUESTION, [*QUESTION, *said]), (CALL, "It is sunny."), strict=True):
        prompt = segment_chat(made.template, tokenizer, to_messages(messages), tools=[spec]).token_ids
        rows.append((prompt, [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(60):
        for prompt, answer in rows:
            ids = torch.tensor([[*prompt, *answer]])
            labels = ids.clone()
            labels[:, : len(prompt)] = -100
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    return asdict(register_model(made))


def test_a_call_is_a_tool_call(arguments):
    generator = BlockRAGChatGenerator(**arguments, tools=[TOOL])
    (reply,) = generator.run(QUESTION)["replies"]
    assert reply.text is None
    assert reply.meta["finish_reason"] == "tool_calls"
    assert [(call.tool_name, call.arguments) for call in reply.tool_calls] == [("weather", {"city": "Thimphu"})]
    assert generator.run(QUESTION, tools=[])["replies"][0].tool_calls == []


def test_a_streamed_call(arguments):
    chunks = []
    generator = BlockRAGChatGenerator(**arguments, tools=[TOOL], streaming_callback=chunks.append)
    (reply,) = generator.run(QUESTION)["replies"]
    call, end = chunks
    assert call.tool_calls[0].tool_name == "weather"
    assert call.tool_calls[0].arguments == '{"city": "Thimphu"}'
    assert call.tool_calls[0].id == reply.tool_calls[0].id
    assert (call.start, call.index, end.finish_reason) == (True, 0, "tool_calls")


def test_haystacks_agent(arguments):
    agent = Agent(chat_generator=BlockRAGChatGenerator(**arguments), tools=[TOOL])
    agent.warm_up()
    messages = agent.run(messages=QUESTION)["messages"]
    assert [message.role.value for message in messages][-4:] == ["user", "assistant", "tool", "assistant"]
    assert messages[-2].tool_call_result.result == "Sunny in Thimphu"
    assert messages[-1].text == "It is sunny."


def test_tools_come_through_serialisation(arguments):
    generator = BlockRAGChatGenerator(**arguments, tools=[TOOL])
    again = BlockRAGChatGenerator.from_dict(generator.to_dict())
    assert again.to_dict() == generator.to_dict()
    assert again.tools[0].invoke(city="Paro") == "Sunny in Paro"


def test_tools_that_cannot_be_shown():
    with pytest.raises(ValueError, match="shows no tools"):
        BlockRAGChatGenerator("demo", tools=[TOOL]).run(QUESTION)
    with pytest.raises(ValueError, match='prompt_form="rag" cannot show the 1 tools'):
        BlockRAGChatGenerator("demo", tools=[TOOL], prompt_form="rag").run(QUESTION)
