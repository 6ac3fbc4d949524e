/** What a call answers instead of a result, taken apart for programs. */

import { BinaryReader } from "@bufbuild/protobuf/wire";
import { ClientError, Status, type CallOptions, type ClientMiddlewareCall } from "nice-grpc";
import { Any, BadRequest, ErrorInfo, RetryInfo, RichClientError } from "nice-grpc-error-details";

// Too many calls a second, or no room until somebody makes some; other quotas fill up in hours.
const SOON_OVER: ReadonlySet<string> = new Set(["CALL_RATE", "DISK_FULL"]);

/** One field of a request that was refused, by its path, and why. */
export interface FieldViolation {
  field: string;
  description: string;
}

/** A call that a server refused or that did not reach one. */
export class ArenaError extends Error {
  override readonly name = "ArenaError";

  /**
   * `code` is the gRPC status; `reason` the machine-readable reason (`NOT_ELIGIBLE`; empty when none was given) with its
   * `metadata`; `violations` the fields that were refused; `retryAfterS` the wait in seconds that the server named.
   */
  constructor(
    readonly code: Status,
    message: string,
    readonly reason: string,
    readonly metadata: Readonly<Record<string, string>>,
    readonly violations: readonly FieldViolation[],
    readonly retryAfterS: number | undefined,
    options?: ErrorOptions,
  ) {
    super(message, options);
  }

  /** Whether the same call may well succeed a little later, as after a restart of the server. */
  get isTransient(): boolean {
    return this.leastPauseMs !== undefined;
  }

  /** The least milliseconds to wait before the same call is made again; undefined where waiting does not help. */
  get leastPauseMs(): number | undefined {
    const isAway = this.code === Status.UNAVAILABLE || this.code === Status.DEADLINE_EXCEEDED;
    const isSoonOver = this.code === Status.RESOURCE_EXHAUSTED && SOON_OVER.has(this.reason);
    return isAway || isSoonOver ? 1000 * (this.retryAfterS ?? 0) : undefined;
  }

  /** The error of a call with its google.rpc details (ErrorInfo, BadRequest, RetryInfo) read. */
  static of(error: ClientError): ArenaError {
    let reason = "";
    let metadata: Record<string, string> = {};
    let violations: FieldViolation[] = [];
    let retryAfterS: number | undefined;
    for (const detail of error instanceof RichClientError ? error.extra : []) {
      switch (detail.$type) {
        case "google.rpc.ErrorInfo": {
          ({ reason, metadata } = detail as ErrorInfo);
          break;
        }
        case "google.rpc.BadRequest":
          violations = (detail as BadRequest).fieldViolations.map(({ field, description }) => ({ field, description }));
          break;
        case "google.rpc.RetryInfo": {
          const delay = (detail as RetryInfo).retryDelay;
          if (delay) retryAfterS = Number(delay.seconds) + delay.nanos / 1e9;
          break;
        }
      }
    }
    return new ArenaError(error.code, error.details, reason, metadata, violations, retryAfterS, { cause: error });
  }
}

/**
 * Client middleware: what the server said in google.rpc details goes with the error, as a RichClientError.
 *
 * Details that can't be read are none. (The library's own middleware reads them in an event of the call, where an error ends
 * the process.)
 */
export async function* detailed<Request, Response>(
  call: ClientMiddlewareCall<Request, Response>,
  options: CallOptions,
): AsyncGenerator<Response, Response | void, undefined> {
  let said: Uint8Array | undefined;
  const onTrailer: CallOptions["onTrailer"] = (trailer) => {
    said = trailer.get("grpc-status-details-bin");
    options.onTrailer?.(trailer);
  };
  try {
    return yield* call.next(call.request, { ...options, onTrailer });
  } catch (error) {
    if (!(error instanceof ClientError) || !said) throw error;
    throw new RichClientError(error.path, error.code, error.details, detailsIn(said));
  }
}

// In google.rpc.Status: the details, each an Any.
const DETAILS_TAG = (3 << 3) | 2;
const KNOWN = [ErrorInfo, BadRequest, RetryInfo];

/** The details of a google.rpc.Status that are known here, up to the first that can't be read. */
function detailsIn(status: Uint8Array): (ErrorInfo | BadRequest | RetryInfo)[] {
  const details: (ErrorInfo | BadRequest | RetryInfo)[] = [];
  try {
    const reader = new BinaryReader(status);
    while (reader.pos < reader.len) {
      const [field, wireType] = reader.tag();
      if (((field << 3) | wireType) !== DETAILS_TAG) {
        reader.skip(wireType, field);
        continue;
      }
      const { typeUrl, value } = Any.decode(reader.bytes());
      const kind = KNOWN.find(({ $type }) => typeUrl.endsWith(`/${$type}`));
      if (kind) details.push(kind.decode(value));
    }
  } catch (error) {
    // Both libraries say by an Error that bytes are no message; anything else is not about the bytes.
    if (!(error instanceof Error)) throw error;
  }
  return details;
}

/** Client middleware: every ClientError leaves as an ArenaError. */
export async function* arenaErrors<Request, Response>(
  call: ClientMiddlewareCall<Request, Response>,
  options: CallOptions,
): AsyncGenerator<Response, Response | void, undefined> {
  try {
    return yield* call.next(call.request, options);
  } catch (error) {
    throw error instanceof ClientError ? ArenaError.of(error) : error;
  }
}
