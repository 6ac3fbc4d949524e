/** What every call passes through: a token, a deadline, a request id, and repeats on a budget by the channel. */

import { randomBytes } from "node:crypto";
import { setMaxListeners } from "node:events";

import type { ChannelOptions } from "@grpc/grpc-js";
import {
  Metadata,
  type CallOptions,
  type ClientMiddleware,
  type ClientMiddlewareCall,
  type CompatServiceDefinition,
} from "nice-grpc";
import type { DeadlineOptions } from "nice-grpc-client-middleware-deadline";

import type { TokenSource } from "./identity.js";

export const MAX_MESSAGE_BYTES = 4 * 1024 * 1024;
/** Of the Open Inference Protocol alone: batches of rows, and what a model answers to them. */
export const INFERENCE_MESSAGE_BYTES = 16 * 1024 * 1024;
const LOOPBACK = /^(localhost|127\.\d+\.\d+\.\d+|\[::1\]):\d+$/;

/** Milliseconds that a call with one answer may take. */
export const DEADLINE_MS = 20_000;
/** Streams end sooner or later, too: a watch or a transfer that does goes on where it was. */
export const STREAM_DEADLINE_MS = 3_600_000;

const SERVICE_CONFIG = JSON.stringify({
  methodConfig: [
    {
      // All methods: a change is keyed by what it changes, or carries a request id (see `repeatable`).
      name: [{}],
      retryPolicy: {
        maxAttempts: 4,
        initialBackoff: "0.2s",
        maxBackoff: "2s",
        backoffMultiplier: 2,
        retryableStatusCodes: ["UNAVAILABLE"],
      },
    },
  ],
  // The budget: with half of the tokens gone to failures nothing is repeated until successes have brought some back.
  retryThrottling: { maxTokens: 100, tokenRatio: 0.1 },
});

/** Options of a channel to `address`: repeats, keepalive, quick reconnects, message limits. */
export function channelOptions(address: string, maxMessageBytes = MAX_MESSAGE_BYTES): ChannelOptions {
  return {
    "grpc.service_config": SERVICE_CONFIG,
    "grpc.enable_retries": 1,
    "grpc.keepalive_time_ms": 30_000,
    "grpc.keepalive_timeout_ms": 10_000,
    "grpc.keepalive_permit_without_calls": 1,
    "grpc.initial_reconnect_backoff_ms": 200,
    "grpc.max_reconnect_backoff_ms": 2_000,
    // A container that comes back has another address: it is asked for this often, not every 30 s.
    "grpc.dns_min_time_between_resolutions_ms": 2_000,
    "grpc.max_receive_message_length": maxMessageBytes,
    "grpc.max_send_message_length": maxMessageBytes,
    // A proxy from the environment can't reach this machine's loopback interface.
    "grpc.enable_http_proxy": LOOPBACK.test(address) ? 0 : 1,
  };
}

/** An idempotency key for one mutating call and all its retries. */
export function newRequestId(): string {
  return randomBytes(16).toString("hex");
}

/** A signal that any number of calls may share, without Node's warning of a leak: each lets go of it when it ends. */
export function shared(signal: AbortSignal | undefined): AbortSignal | undefined {
  if (signal) setMaxListeners(0, signal);
  return signal;
}

/** Client middleware: the signals of calls may be shared. */
export async function* sharing<Request, Response>(
  call: ClientMiddlewareCall<Request, Response>,
  options: CallOptions,
): AsyncGenerator<Response, Response | void, undefined> {
  return yield* call.next(call.request, { ...options, signal: shared(options.signal) });
}

/** Client middleware: a fresh token on every call. */
export function bearer(tokens: TokenSource): ClientMiddleware {
  return async function* withToken<Request, Response>(
    call: ClientMiddlewareCall<Request, Response>,
    options: CallOptions,
  ) {
    const metadata = Metadata(options.metadata).set("authorization", `Bearer ${tokens.token()}`);
    return yield* call.next(call.request, { ...options, metadata });
  };
}

/** Client middleware: a deadline for each call that names none. Attach it after the one that keeps deadlines. */
export function deadlines(deadlineMs: number): ClientMiddleware<DeadlineOptions> {
  return async function* withDeadline<Request, Response>(
    call: ClientMiddlewareCall<Request, Response, DeadlineOptions>,
    options: CallOptions & DeadlineOptions,
  ) {
    const deadline = options.deadline ?? (call.requestStream || call.responseStream ? STREAM_DEADLINE_MS : deadlineMs);
    return yield* call.next(call.request, { ...options, deadline });
  };
}

/** Client middleware: a request id for each change that names none, since the channel may send it twice. */
export function repeatable(service: CompatServiceDefinition): ClientMiddleware {
  const keyed = keyedMethods(service);
  return async function* withRequestId<Request, Response>(
    call: ClientMiddlewareCall<Request, Response>,
    options: CallOptions,
  ) {
    if (call.requestStream) return yield* call.next(call.request, options);
    const request = call.request as Request & { requestId?: string };
    const missing = keyed.has(call.method.path) && !request.requestId;
    return yield* call.next(missing ? { ...request, requestId: newRequestId() } : request, options);
  };
}

/** The paths of the methods whose request has a request id. */
function keyedMethods(service: CompatServiceDefinition): ReadonlySet<string> {
  if (!("fullName" in service)) throw new TypeError("no definition that ts-proto made");
  const methods = Object.values(service.methods) as { name: string; requestType: { fromPartial(value: object): object } }[];
  const keyed = methods.filter(({ requestType }) => "requestId" in requestType.fromPartial({}));
  return new Set(keyed.map(({ name }) => `/${service.fullName as string}/${name}`));
}
