/** Connections of a participant to an arena: typed clients of every service, with tokens, deadlines and retries. */

import { randomBytes } from "node:crypto";

import { ChannelCredentials, type ChannelOptions } from "@grpc/grpc-js";
import {
  Metadata,
  Status,
  createChannel,
  createClientFactory,
  type CallOptions,
  type Channel,
  type Client as ServiceClient,
  type ClientMiddleware,
  type ClientMiddlewareCall,
  type CompatServiceDefinition,
} from "nice-grpc";
import { deadlineMiddleware, type DeadlineOptions } from "nice-grpc-client-middleware-deadline";
import { retryMiddleware, type RetryOptions } from "nice-grpc-client-middleware-retry";
import { errorDetailsClientMiddleware } from "nice-grpc-error-details";

import { arenaErrors } from "./errors.js";
import { Key, TokenSource } from "./identity.js";
import { GRPCInferenceServiceDefinition } from "./proto/tiltyard/inference/v2/inference.js";
import { ArtifactServiceDefinition } from "./proto/tiltyard/registry/v1/artifact.js";
import { AssignmentServiceDefinition } from "./proto/tiltyard/registry/v1/assignment.js";
import { EvaluationServiceDefinition } from "./proto/tiltyard/registry/v1/evaluation.js";
import { LeaderboardServiceDefinition } from "./proto/tiltyard/registry/v1/leaderboard.js";
import { LogServiceDefinition } from "./proto/tiltyard/registry/v1/log.js";
import { MembershipServiceDefinition } from "./proto/tiltyard/registry/v1/membership.js";
import { ParticipantServiceDefinition } from "./proto/tiltyard/registry/v1/participant.js";
import { SubmissionServiceDefinition } from "./proto/tiltyard/registry/v1/submission.js";
import { TaskServiceDefinition } from "./proto/tiltyard/registry/v1/task.js";
import { DrawServiceDefinition } from "./proto/tiltyard/selector/v1/draw.js";
import { StakeServiceDefinition } from "./proto/tiltyard/selector/v1/stake.js";
import { TrainingServiceDefinition } from "./proto/tiltyard/trainer/v1/trainer.js";
import { ValidationServiceDefinition } from "./proto/tiltyard/validator/v1/validator.js";

const DEADLINE_MS = 20_000;
const MAX_MESSAGE_BYTES = 4 * 1024 * 1024;

/** What a call may be told beside its request: deadline, retries, an abort signal. */
export type ArenaCallOptions = DeadlineOptions & RetryOptions;
type Calls<Service extends CompatServiceDefinition> = ServiceClient<Service, ArenaCallOptions>;

/** Where and as whom to connect. Addresses are `HOST:PORT`. */
export interface ArenaOptions {
  /** The participant's key. */
  key: Key;
  /** The arena's name, `tiltyard.local` where nobody chose another. */
  origin: string;
  /** Address of the registry. */
  registry: string;
  /** Address of the selector, for stakes, odds and draws. */
  selector?: string;
  /** TLS: the authority of the servers, and for mutual TLS the own certificate and key, each PEM. Left out: plaintext. */
  tls?: TlsOptions;
}

/** PEM texts of a TLS client. */
export interface TlsOptions {
  ca?: Buffer;
  certificate?: Buffer;
  key?: Buffer;
}

/** An idempotency key for one mutating call and all its retries. */
export function newRequestId(): string {
  return randomBytes(16).toString("hex");
}

class Connections {
  readonly #channels = new Map<string, Channel>();

  constructor(
    readonly key: Key,
    private readonly tls: TlsOptions | undefined,
  ) {}

  /** Resource name of the key's holder. */
  get participant(): string {
    return `participants/${this.key.id}`;
  }

  protected calls<Service extends CompatServiceDefinition>(
    service: Service,
    address: string,
    audience: string,
  ): Calls<Service> {
    const channel = this.#channels.get(address) ?? createChannel(address, credentials(this.tls), channelOptions());
    this.#channels.set(address, channel);
    const defaults: ArenaCallOptions = {
      retry: true,
      retryMaxAttempts: 3,
      retryBaseDelayMs: 200,
      retryMaxDelayMs: 2_000,
      // Mutating calls may be sent again: each carries a request id.
      retryableStatuses: [Status.UNAVAILABLE],
    };
    // The first is the outermost: a failure is taken apart after the last retry, and a deadline is over all of them.
    return createClientFactory()
      .use(bearer(new TokenSource(this.key, audience)))
      .use(errorDetailsClientMiddleware)
      .use(retryMiddleware)
      .use(unaryDeadline)
      .use(deadlineMiddleware)
      .use(arenaErrors)
      .create(service, channel, { "*": defaults }) as Calls<Service>;
  }

  /** Closes the connections; calls in flight fail. */
  close(): void {
    for (const channel of this.#channels.values()) channel.close();
    this.#channels.clear();
  }

  [Symbol.dispose](): void {
    this.close();
  }
}

/** A participant's connections to one arena. Unary calls get a deadline of 20 s unless they name one. */
export class Client extends Connections {
  readonly origin: string;
  readonly #registry: string;
  readonly #selector: string | undefined;

  constructor(options: ArenaOptions) {
    super(options.key, options.tls);
    this.origin = options.origin;
    this.#registry = options.registry;
    this.#selector = options.selector;
  }

  /** ParticipantService of the registry. */
  get participants(): Calls<typeof ParticipantServiceDefinition> {
    return this.#ofRegistry(ParticipantServiceDefinition);
  }

  /** TaskService of the registry. */
  get tasks(): Calls<typeof TaskServiceDefinition> {
    return this.#ofRegistry(TaskServiceDefinition);
  }

  /** MembershipService of the registry. */
  get memberships(): Calls<typeof MembershipServiceDefinition> {
    return this.#ofRegistry(MembershipServiceDefinition);
  }

  /** SubmissionService of the registry. */
  get submissions(): Calls<typeof SubmissionServiceDefinition> {
    return this.#ofRegistry(SubmissionServiceDefinition);
  }

  /** AssignmentService of the registry. */
  get assignments(): Calls<typeof AssignmentServiceDefinition> {
    return this.#ofRegistry(AssignmentServiceDefinition);
  }

  /** EvaluationService of the registry. */
  get evaluations(): Calls<typeof EvaluationServiceDefinition> {
    return this.#ofRegistry(EvaluationServiceDefinition);
  }

  /** LeaderboardService of the registry. */
  get leaderboard(): Calls<typeof LeaderboardServiceDefinition> {
    return this.#ofRegistry(LeaderboardServiceDefinition);
  }

  /** ArtifactService of the registry; see `upload` and `download`. */
  get artifacts(): Calls<typeof ArtifactServiceDefinition> {
    return this.#ofRegistry(ArtifactServiceDefinition);
  }

  /** LogService of the registry. */
  get log(): Calls<typeof LogServiceDefinition> {
    return this.#ofRegistry(LogServiceDefinition);
  }

  /** StakeService of the selector. */
  get stakes(): Calls<typeof StakeServiceDefinition> {
    return this.#ofSelector(StakeServiceDefinition);
  }

  /** DrawService of the selector. */
  get draws(): Calls<typeof DrawServiceDefinition> {
    return this.#ofSelector(DrawServiceDefinition);
  }

  #ofRegistry<Service extends CompatServiceDefinition>(service: Service): Calls<Service> {
    return this.calls(service, this.#registry, `${this.origin}/registry`);
  }

  #ofSelector<Service extends CompatServiceDefinition>(service: Service): Calls<Service> {
    if (this.#selector === undefined) throw new Error("the selector's address is not given");
    return this.calls(service, this.#selector, `${this.origin}/selector`);
  }
}

/** Connections to one trainer or validator at `address`, whose key has the id `nodeId`. */
export class Node extends Connections {
  readonly #address: string;
  readonly #nodeId: string;

  constructor(options: { key: Key; address: string; nodeId: string; tls?: TlsOptions }) {
    super(options.key, options.tls);
    this.#address = options.address;
    this.#nodeId = options.nodeId;
  }

  /** TrainingService of a trainer. */
  get trainings(): Calls<typeof TrainingServiceDefinition> {
    return this.calls(TrainingServiceDefinition, this.#address, this.#nodeId);
  }

  /** ValidationService of a validator. */
  get validation(): Calls<typeof ValidationServiceDefinition> {
    return this.calls(ValidationServiceDefinition, this.#address, this.#nodeId);
  }

  /** Open Inference Protocol of a trainer's models. */
  get inference(): Calls<typeof GRPCInferenceServiceDefinition> {
    return this.calls(GRPCInferenceServiceDefinition, this.#address, this.#nodeId);
  }
}

function bearer(tokens: TokenSource): ClientMiddleware {
  return async function* withToken<Request, Response>(
    call: ClientMiddlewareCall<Request, Response>,
    options: CallOptions,
  ) {
    const metadata = Metadata(options.metadata).set("authorization", `Bearer ${tokens.token()}`);
    return yield* call.next(call.request, { ...options, metadata });
  };
}

async function* unaryDeadline<Request, Response>(
  call: ClientMiddlewareCall<Request, Response, DeadlineOptions>,
  options: CallOptions & DeadlineOptions,
) {
  const isUnary = !call.requestStream && !call.responseStream;
  return yield* call.next(call.request, isUnary ? { deadline: DEADLINE_MS, ...options } : options);
}

function credentials(tls: TlsOptions | undefined): ChannelCredentials {
  if (tls === undefined) return ChannelCredentials.createInsecure();
  return ChannelCredentials.createSsl(tls.ca ?? null, tls.key ?? null, tls.certificate ?? null);
}

function channelOptions(): ChannelOptions {
  return {
    "grpc.keepalive_time_ms": 30_000,
    "grpc.keepalive_timeout_ms": 10_000,
    "grpc.keepalive_permit_without_calls": 1,
    "grpc.initial_reconnect_backoff_ms": 200,
    "grpc.max_reconnect_backoff_ms": 2_000,
    "grpc.max_receive_message_length": MAX_MESSAGE_BYTES,
    "grpc.max_send_message_length": MAX_MESSAGE_BYTES,
  };
}
