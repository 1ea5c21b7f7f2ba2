"""Tools and agents, with a tiny model that was taught one conversation: call the tool, answer from what it found."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import pytest
import torch
from conftest import Ear
from llama_index.core.agent.workflow import AgentStream, FunctionAgent, ToolCallResult
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, ToolCallBlock
from llama_index.core.llms import TextBlock
from llama_index.core.prompts import ChatPromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.blockrag import BlockCacheEvent, BlockRAGLLM, PassageBlock
from llama_index.llms.blockrag.messages import prepare
from llama_index.llms.blockrag.tool_calls import shown_of, split_calls
from pydantic import create_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from blockrag import BlockAttentionFacts, BlockModel
from blockrag.attention import additive_mask, block_mask

SYSTEM = "Use the tool."
QUESTION = "What is the capital of Bhutan?"
CALL = '<tool_call>\n{"name": "search", "arguments": {"query": "Bhutan"}}\n</tool_call>'
ANSWER = "It is Thimphu."
PASSAGES = ["The capital of Bhutan is Thimphu.", "Bhutan lies in the mountains."]

# The form of Qwen's chat templates.
TEMPLATE = """{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}

{% endif %}# Tools
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}<|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% elif message.role != 'system' %}<|im_start|>{{ message.role }}
{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

FOUND: list[str] = []


def search(query: str) -> list[PassageBlock]:
    """Search the library."""
    FOUND.append(query)
    return [PassageBlock(text=text, node_id=str(number)) for number, text in enumerate(PASSAGES)]


TOOL = FunctionTool.from_defaults(search)
ASKING = [ChatMessage(role="system", content=SYSTEM), ChatMessage(role="user", content=QUESTION)]
TOLD = [
    *ASKING,
    ChatMessage(
        role="assistant",
        blocks=[ToolCallBlock(tool_call_id="1", tool_name="search", tool_kwargs={"query": "Bhutan"})],
    ),
    ChatMessage(role="tool", blocks=search("Bhutan"), additional_kwargs={"tool_call_id": "1"}),
]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE(unk_token=None))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    schema = str(TOOL.metadata.to_openai_tool())
    core.train_from_iterator(
        [SYSTEM, QUESTION, CALL, ANSWER, schema, *PASSAGES] * 4,
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )


@pytest.fixture(scope="module")
def llm() -> BlockRAGLLM:
    """The taught model: two prompts, each under the block mask it will be asked with, and what to say to them."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    network = LlamaForCausalLM(config)
    network.set_attn_implementation("eager")
    facts = BlockAttentionFacts(block_fine_tuned=True)
    model = BlockModel(network, tokenizer, facts=facts, precision="float32")
    tools = [TOOL.metadata.to_openai_tool()]
    lessons = []
    for messages, said in ((ASKING, CALL), (TOLD, ANSWER)):
        prompt = prepare(model, messages, tools=tools).prompt
        target = [*tokenizer.encode(said, add_special_tokens=False), tokenizer.eos_token_id]
        ids = torch.tensor([[*prompt.token_ids, *target]])
        lengths = [*prompt.lengths[:-1], prompt.lengths[-1] + len(target)]
        mask = additive_mask(block_mask(lengths, [block.local for block in prompt.blocks]), torch.float32)
        lessons.append((ids, mask, prompt.num_tokens))
    with torch.enable_grad():
        optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
        network.train()
        for _ in range(80):
            loss = torch.zeros(())
            for ids, mask, start in lessons:
                logits = network(input_ids=ids, attention_mask=mask[None, None]).logits
                loss = loss + torch.nn.functional.cross_entropy(logits[0, start - 1 : -1], ids[0, start:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if loss < 1e-2:
                break
    network.eval()
    return BlockRAGLLM.from_model(BlockModel(network, tokenizer, facts=facts), max_new_tokens=64)


@pytest.fixture(autouse=True)
def _nothing_found() -> None:
    FOUND.clear()


def test_tools_are_offered_and_called(llm: BlockRAGLLM) -> None:
    assert llm.metadata.is_function_calling_model
    response = llm.chat_with_tools([TOOL], user_msg=QUESTION, chat_history=ASKING[:1])
    (call,) = llm.get_tool_calls_from_response(response)
    assert (call.tool_name, call.tool_kwargs) == ("search", {"query": "Bhutan"})
    assert [type(block) for block in response.message.blocks] == [ToolCallBlock]
    assert response.raw["finish_reason"] == "tool_calls"
    said = llm.predict_and_call([TOOL], user_msg=ASKING[1], chat_history=ASKING[:1])
    assert FOUND == ["Bhutan"]
    assert PASSAGES[0] in str(said)


async def test_structured_answers_come_through_a_tool(llm: BlockRAGLLM) -> None:
    # The model was taught the tool of this name, description and fields.
    schema = create_model("search", __doc__=TOOL.metadata.description, query=(str, ...))
    prompt = ChatPromptTemplate(message_templates=ASKING)
    assert llm.structured_predict(schema, prompt).query == "Bhutan"
    assert (await llm.astructured_predict(schema, prompt)).query == "Bhutan"
    assert llm.as_structured_llm(schema).chat(ASKING).raw.query == "Bhutan"


def test_what_the_model_calls_is_its_own_choice(llm: BlockRAGLLM) -> None:
    assert llm.chat_with_tools([TOOL], chat_history=ASKING, tool_choice="auto", tool_required=True).message.blocks
    with pytest.raises(ValueError, match="tool_choice='search' cannot be forced on this model; leave it out"):
        llm.chat_with_tools([TOOL], chat_history=ASKING, tool_choice="search")


async def test_streaming_with_tools_shows_no_calls(llm: BlockRAGLLM) -> None:
    ways = [
        list(llm.stream_chat_with_tools([TOOL], chat_history=ASKING)),
        [piece async for piece in await llm.astream_chat_with_tools([TOOL], chat_history=ASKING)],
    ]
    for pieces in ways:
        assert "".join(piece.delta or "" for piece in pieces) == ""
        assert llm.get_tool_calls_from_response(pieces[-1])[0].tool_kwargs == {"query": "Bhutan"}
    answer = list(llm.stream_chat_with_tools([TOOL], chat_history=TOLD))
    assert len(answer) > 2
    assert "".join(piece.delta or "" for piece in answer) == answer[-1].message.content == ANSWER


async def test_a_call_being_written_leaves_others_their_turn(llm: BlockRAGLLM) -> None:
    done: list[str] = []

    async def call() -> None:
        await llm.achat_with_tools([TOOL], chat_history=ASKING)
        done.append("call")

    async def answer() -> None:
        async for _ in await llm.astream_chat_with_tools([TOOL], chat_history=TOLD):
            done.append("piece")

    await asyncio.gather(call(), answer())
    assert done[0] == "piece"
    assert "call" in done


def test_one_call_unless_several_are_allowed(llm: BlockRAGLLM) -> None:
    calls = [ToolCallBlock(tool_call_id=str(n), tool_name="search", tool_kwargs={"query": str(n)}) for n in range(2)]

    def response() -> ChatResponse:
        return ChatResponse(message=ChatMessage(role="assistant", blocks=[TextBlock(text="Both."), *calls]))

    (call,) = llm.get_tool_calls_from_response(llm._validate_chat_with_tools_response(response(), [TOOL]))
    assert call.tool_kwargs == {"query": "0"}
    several = llm._validate_chat_with_tools_response(response(), [TOOL], allow_parallel_tool_calls=True)
    assert len(llm.get_tool_calls_from_response(several)) == 2


# LlamaIndex asks every workflow, and thereby every agent, for all of its attributes.
@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning")
@pytest.mark.parametrize("streaming", [False, True])
async def test_an_agent_answers_from_passages_that_are_blocks(llm: BlockRAGLLM, streaming: bool, ear: Ear) -> None:
    agent = FunctionAgent(tools=[TOOL], llm=llm, system_prompt=SYSTEM, streaming=streaming)
    for run in range(2):
        ear.events.clear()
        handler = agent.run(QUESTION)
        events = [event async for event in handler.stream_events()]
        response = await handler
        assert str(response) == ANSWER
        assert ["Bhutan"] * (run + 1) == FOUND
        (result,) = [event for event in events if isinstance(event, ToolCallResult)]
        assert [block.text for block in result.tool_output.blocks] == PASSAGES
        assert not any("tool_call" in event.delta for event in events if isinstance(event, AgentStream))
        calling, answering = ear.of(BlockCacheEvent)
        assert (calling.passages_found, answering.passages_found) == (0, 2)
    # Two passages and the line break between them, from the first run; the conversation before them is its own.
    assert (answering.blocks_reused, answering.blocks_computed) == (3, 2)


def test_tools_in_the_rag_form_keep_the_chat_form(llm: BlockRAGLLM) -> None:
    tools = [TOOL.metadata.to_openai_tool()]
    rag = prepare(llm.block_model, TOLD, tools=tools, form="rag").prompt
    assert rag == prepare(llm.block_model, TOLD, tools=tools).prompt


def test_calls_given_as_json_text(llm: BlockRAGLLM) -> None:
    as_text = ToolCallBlock(tool_call_id="1", tool_name="search", tool_kwargs='{"query": "Bhutan"}')
    messages = [*ASKING, ChatMessage(role="assistant", blocks=[as_text]), TOLD[-1]]
    tools = [TOOL.metadata.to_openai_tool()]
    assert prepare(llm.block_model, messages, tools=tools).prompt == prepare(llm.block_model, TOLD, tools=tools).prompt


def test_text_beside_a_call_is_kept(llm: BlockRAGLLM) -> None:
    blocks: list[Any] = [TextBlock(text="I look it up."), *TOLD[2].blocks]
    messages = [*ASKING, ChatMessage(role="assistant", blocks=blocks), TOLD[-1]]
    assert "I look it up.<tool_call>" in prepare(llm.block_model, messages).prompt.text


@pytest.mark.parametrize(
    "said",
    [
        "Plain text, no calls at all. ",
        ' \n Text before.\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
        '{"name": "f", "parameters": {"x": 1}}',
        '[TOOL_CALLS][{"name": "f", "arguments": {}}]',
        '<|python_tag|>{"name": "f", "parameters": {}}',
        "{ this is no call }",
        "a < b and <tool is no call",
        "<tool_call>broken",
        "",
    ],
)
def test_what_is_shown_while_it_is_written_is_a_prefix_of_the_text(said: str) -> None:
    text, _ = split_calls(said)
    shown = [shown_of(said[:end]) for end in range(len(said) + 1)]
    assert all(text.startswith(piece) for piece in shown)
    assert all(len(piece) >= len(before) for before, piece in pairwise(shown))
