"""A replica: one model version in one Ray Serve process."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import replace
from functools import partial

from opentelemetry.trace import SpanKind

from common import manifest, tracing
from common.chat import check_template
from common.errors import Internal, InvalidArgument, LuthierError, Unavailable, Violation
from serving.batching import Batcher
from serving.engines import Completion, Engine, Request, SamplingParams, load_engine, tool_calls
from serving.engines.base import Piece
from serving.wire import AdapterRef, Ask, Event, ModelArgs, Started


class ModelReplica:
    """Fetches its model into the node's cache, loads it, and answers the gateway."""

    def __init__(self, args: ModelArgs) -> None:
        tracing.start_from_environment("luthier-replica")
        import torch
        from transformers.utils import logging as transformers_logging

        # Ray's default depends on the environment of the node; two replicas on one core must not fight for all cores.
        torch.set_num_threads(max(1, args.threads))
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        transformers_logging.disable_progress_bar()
        model_dir = manifest.fetch(args.artifact_uri, args.artifact_sha256)
        base_dir = manifest.fetch(args.base_uri, args.base_sha256) if args.base_uri else None
        self._engine: Engine = load_engine(model_dir, base_dir, args.device)
        check_template(args.chat_template_sha256, self._engine.chat_template_sha256)
        self._batcher = Batcher(self._engine)
        self._loading: dict[str, asyncio.Lock] = {}

    def check_health(self) -> None:
        """Tell Serve whether to replace this replica."""
        if not self._batcher.healthy:
            raise RuntimeError("the engine fails again and again, or its thread is gone")

    async def prepare(self, adapter: AdapterRef) -> None:
        """Fetch an adapter and make it ready for use. Raises what is wrong with it: never is the model served in its place."""
        async with self._loading.setdefault(adapter.name, asyncio.Lock()):
            if not self._batcher.has_adapter(adapter.name):
                check_template(adapter.chat_template_sha256, self._engine.chat_template_sha256)
                folder = await asyncio.to_thread(manifest.fetch, adapter.uri, adapter.sha256)
                await asyncio.to_thread(self._batcher.add_adapter, adapter.name, folder)
        self._loading.pop(adapter.name, None)

    async def complete(self, ask: Ask) -> list[Completion]:
        """Answer in one piece. Cancelling the call ends the generation."""
        with tracing.span("replica", ask.trace_parent, SpanKind.SERVER) as span:
            completions = await self._complete(ask, tracing.traceparent(span))
            span.set_attribute("luthier.tokens", sum(completion.completion_tokens for completion in completions))
            return completions

    async def _complete(self, ask: Ask, trace_parent: str) -> list[Completion]:
        requests = await self._prepared(ask, trace_parent)
        loop = asyncio.get_running_loop()
        answers: list[asyncio.Future[Completion]] = []
        try:
            for request, _ in requests:
                answer: asyncio.Future[Completion] = loop.create_future()
                answers.append(answer)
                self._batcher.submit(request, _resolver(loop, answer))
            completions = await asyncio.gather(*answers)
            calls = self._engine.tool_style if ask.tools else ""
            return [replace(_whole(each), index=index, calls=calls) for index, each in enumerate(completions)]
        finally:
            for request, _ in requests:
                request.cancel.set()

    async def stream(self, ask: Ask) -> AsyncIterator[Event]:
        """Answer as it comes: Started, then texts, then the Completion. Closing or cancelling ends the generation."""
        span = tracing.begin("replica", ask.trace_parent, SpanKind.SERVER)
        try:
            async with contextlib.aclosing(self._stream(ask, tracing.traceparent(span))) as events:
                async for event in events:
                    if isinstance(event, Completion):
                        span.set_attribute("luthier.tokens", event.completion_tokens)
                    yield event
        except LuthierError as error:
            tracing.failed(span, error.reason)
            raise
        finally:
            span.end()

    async def _stream(self, ask: Ask, trace_parent: str) -> AsyncGenerator[Event]:
        requests = await self._prepared(ask, trace_parent)
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Piece | Completion | BaseException] = asyncio.Queue()

        def put(index: int, event: Piece | Completion | BaseException) -> None:
            if not isinstance(event, BaseException):
                event = replace(event, index=index)
            loop.call_soon_threadsafe(events.put_nowait, event)

        try:
            yield Started(requests[0][1], self._engine.tool_style if ask.tools else "")
            for index, (request, _) in enumerate(requests):
                request.on_piece = partial(put, index)
                self._batcher.submit(request, partial(put, index))
            open_ = len(requests)
            while open_:
                event = await events.get()
                if isinstance(event, BaseException):
                    raise _told(event)
                if isinstance(event, Completion):
                    open_ -= 1
                    event = _whole(event)
                yield event
        finally:
            for request, _ in requests:
                request.cancel.set()

    async def _prepared(self, ask: Ask, trace_parent: str) -> list[tuple[Request, int]]:
        if ask.adapter is not None:
            await self.prepare(ask.adapter)
        return await asyncio.to_thread(self._requests, ask, trace_parent)

    def _requests(self, ask: Ask, trace_parent: str) -> list[tuple[Request, int]]:
        """Render and check, so that what is wrong with a request is said before it waits in a batch."""
        prompts = [self._engine.render(ask.messages, ask.tools)] if ask.messages else list(ask.prompts)
        if not prompts:
            raise InvalidArgument("there is nothing to complete")
        params = self._params(ask)
        self._engine.check_params(params)
        adapter = ask.adapter.name if ask.adapter is not None else ""
        requests = []
        for prompt in prompts:
            tokens = self._engine.check(prompt)
            for number in range(ask.n):
                own = params if params.seed is None or not number else replace(params, seed=_other_seed(params.seed, number))
                requests.append((Request(prompt, own, trace_parent=trace_parent, adapter=adapter), tokens))
        return requests

    def _params(self, ask: Ask) -> SamplingParams:
        """How to generate, where a tool has to be called."""
        if not ask.must_call:
            return ask.params
        name = ask.must_call if isinstance(ask.must_call, str) else ""
        grammar = tool_calls.grammar(ask.tools, self._engine.tool_style, name)
        if not grammar:
            why = "nobody knows how this model writes calls, so it cannot be made to call; leave it at auto"
            raise InvalidArgument.of([Violation("tool_choice", why)])
        return replace(ask.params, grammar=grammar)

    def __del__(self) -> None:
        batcher = getattr(self, "_batcher", None)
        if batcher is not None:
            batcher.close()


def _resolver(
    loop: asyncio.AbstractEventLoop, answer: asyncio.Future[Completion]
) -> Callable[[Completion | BaseException], None]:
    def resolve(result: Completion | BaseException) -> None:
        if answer.done():
            return
        if isinstance(result, BaseException):
            answer.set_exception(_told(result))
        else:
            answer.set_result(result)

    def done(result: Completion | BaseException) -> None:
        loop.call_soon_threadsafe(resolve, result)

    return done


def _other_seed(seed: int, number: int) -> int:
    """A seed for another answer to the same prompt, within 64 bits."""
    return (seed + number + 2**63) % 2**64 - 2**63


def _told(error: BaseException) -> LuthierError:
    """Return what may be told about `error`: its details stay in the replica's log."""
    return error if isinstance(error, LuthierError) else Internal("the engine failed")


def _whole(completion: Completion) -> Completion:
    if completion.finish_reason == "cancelled":  # nobody who still waits has asked for that
        raise Unavailable("the replica stopped before the answer was complete")
    return completion
