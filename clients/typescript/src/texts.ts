/** Texts of messages, checked before they are sent: half of a surrogate pair has no UTF-8, and would arrive as U+FFFD. */

import type { CallOptions, ClientMiddlewareCall } from "nice-grpc";

import { utf8 } from "./bytes.js";

/** Throws RangeError with the path of the first field of `message` whose text has no UTF-8. */
export function checkTexts(message: unknown, path = ""): void {
  if (typeof message === "string") {
    try {
      utf8(message);
    } catch (error) {
      throw new RangeError(`${path}: ${(error as Error).message}`, { cause: error });
    }
  } else if (Array.isArray(message)) {
    // Numbers come by the thousand.
    if (typeof message[0] !== "number") message.forEach((each, at) => checkTexts(each, `${path}[${at}]`));
  } else if (typeof message === "object" && message !== null && !ArrayBuffer.isView(message)) {
    // Of a oneof, `$case` names the field and `value` is what it holds.
    const { $case } = message as { $case?: unknown };
    for (const [name, value] of Object.entries(message)) {
      const field = $case !== undefined && name === "value" ? String($case) : name;
      const at = path === "" ? field : `${path}.${field}`;
      checkTexts(name, at); // a map's key is a text of the caller's
      checkTexts(value, at);
    }
  }
}

/** Client middleware: no request goes out with a text that would arrive as another. */
export async function* texts<Request, Response>(
  call: ClientMiddlewareCall<Request, Response>,
  options: CallOptions,
): AsyncGenerator<Response, Response | void, undefined> {
  if (call.requestStream) return yield* call.next(checked(call.request), options);
  checkTexts(call.request);
  return yield* call.next(call.request, options);
}

async function* checked<Request>(messages: AsyncIterable<Request>): AsyncGenerator<Request, void, undefined> {
  for await (const message of messages) {
    checkTexts(message);
    yield message;
  }
}
