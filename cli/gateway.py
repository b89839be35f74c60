"""Asking an endpoint over HTTP with the official OpenAI client."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cli.context import Cli
from cli.failures import FAILED, NOT_ALLOWED, NOT_FOUND, UNREACHABLE, USAGE, Failure

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.chat import ChatCompletionMessageParam

STATUS_OF_HTTP = {400: USAGE, 422: USAGE, 401: NOT_ALLOWED, 403: NOT_ALLOWED, 404: NOT_FOUND}


def openai_client(url: str, token: str) -> OpenAI:
    """A client of the gateway at `url`."""
    from openai import DefaultHttpxClient, OpenAI

    # A proxy from the environment cannot reach this machine's loopback.
    loopback = "//127." in url or "//localhost" in url
    return OpenAI(base_url=url, api_key=token or "none", http_client=DefaultHttpxClient(trust_env=not loopback), timeout=300)


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn the OpenAI client's errors into ours, with the exit status that goes with them."""
    import openai

    try:
        yield
    except openai.APIConnectionError as error:
        raise Failure(f"no gateway answers at {url}: {error.__cause__ or error}; see `luthier status`", UNREACHABLE) from error
    except openai.APIStatusError as error:
        body = error.body if isinstance(error.body, dict) else {}
        raise Failure(str(body.get("message") or error.message), STATUS_OF_HTTP.get(error.status_code, FAILED)) from error


def ask(cli: Cli, url: str, endpoint: str, text: str, system: str, stream: bool, max_tokens: int, temperature: float) -> None:
    """Ask a question and print the answer."""
    messages: list[ChatCompletionMessageParam] = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    settings: dict[str, Any] = {"model": endpoint, "max_tokens": max_tokens, "temperature": temperature}
    client = openai_client(url, cli.token)
    with explained(url):
        if stream:
            for chunk in client.chat.completions.create(messages=messages, stream=True, **settings):
                if cli.json:
                    cli.out.line(chunk.model_dump(mode="json"), "")
                elif chunk.choices:
                    print(chunk.choices[0].delta.content or "", end="", flush=True)
            if not cli.json:
                print()
        else:
            answer = client.chat.completions.create(messages=messages, stream=False, **settings)
            cli.out.answer(answer.model_dump(mode="json"), answer.choices[0].message.content or "")
