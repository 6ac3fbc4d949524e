/** Connections of a participant to an arena: typed clients of every service, with tokens, deadlines and retries. */

import { Channel, ChannelCredentials } from "@grpc/grpc-js";
import { createClientFactory, type Client as ServiceClient, type CompatServiceDefinition } from "nice-grpc";
import { deadlineMiddleware, type DeadlineOptions } from "nice-grpc-client-middleware-deadline";

import { checkAddress } from "./addresses.js";
import { CircuitBreaker, breaking } from "./breaker.js";
import {
  DEADLINE_MS,
  INFERENCE_MESSAGE_BYTES,
  MAX_MESSAGE_BYTES,
  bearer,
  channelOptions,
  deadlines,
  repeatable,
  sharing,
} from "./calling.js";
import { arenaErrors, detailed } from "./errors.js";
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
import { texts } from "./texts.js";
import { FollowedPem, following, type TlsOptions } from "./tls.js";

/** What a call may be told beside its request: a deadline, metadata, an abort signal. */
export type ArenaCallOptions = DeadlineOptions;
type Calls<Service extends CompatServiceDefinition> = ServiceClient<Service, ArenaCallOptions>;

/** Where and as whom to connect. Addresses are `HOST:PORT`, or `unix:PATH`, which is never encrypted; others throw RangeError. */
export interface ArenaOptions {
  /** The participant's key. */
  key: Key;
  /** The arena's name, `tiltyard.local` where nobody chose another. */
  origin: string;
  /** Address of the registry. */
  registry: string;
  /** Address of the selector, for stakes, odds and draws. */
  selector?: string;
  /** TLS: the authority of the servers, and for mutual TLS the own certificate and key. Left out: plaintext. */
  tls?: TlsOptions;
  /** Milliseconds for each call with one answer that names no deadline, 20,000 where left out. */
  deadlineMs?: number;
}

class Connections {
  readonly #channels = new Map<string, Channel>();
  readonly #breakers = new Map<string, CircuitBreaker>();
  readonly #services = new Map<CompatServiceDefinition, unknown>();
  readonly #pem: FollowedPem | undefined;

  constructor(
    readonly key: Key,
    tls: TlsOptions | undefined,
    private readonly deadlineMs: number = DEADLINE_MS,
    private readonly maxMessageBytes: number = MAX_MESSAGE_BYTES,
  ) {
    this.#pem = tls && new FollowedPem(tls);
  }

  /** Resource name of the key's holder. */
  get participant(): string {
    return `participants/${this.key.id}`;
  }

  protected calls<Service extends CompatServiceDefinition>(
    service: Service,
    address: string,
    audience: string,
  ): Calls<Service> {
    const known = this.#services.get(service);
    if (known !== undefined) return known as Calls<Service>;
    const channel = this.#channels.get(address) ?? this.#open(address);
    this.#channels.set(address, channel);
    const breaker = this.#breakers.get(address) ?? new CircuitBreaker(address);
    this.#breakers.set(address, breaker);
    // The last is the outermost: a failure is taken apart where it arrives and leaves as an ArenaError.
    let factory = createClientFactory();
    if (this.#pem) factory = factory.use(following(this.#pem));
    const calls = factory
      .use(bearer(new TokenSource(this.key, audience)))
      .use(detailed)
      .use(deadlineMiddleware)
      .use(deadlines(this.deadlineMs))
      .use(breaking(breaker, this.deadlineMs))
      .use(repeatable(service))
      .use(sharing)
      .use(texts)
      .use(arenaErrors)
      .create(service, channel) as Calls<Service>;
    this.#services.set(service, calls);
    return calls;
  }

  #open(address: string): Channel {
    // Nobody listens in on a Unix socket.
    const encrypted = address.startsWith("unix:") ? undefined : this.#pem?.credentials();
    const options = channelOptions(address, this.maxMessageBytes);
    return new Channel(address, encrypted ?? ChannelCredentials.createInsecure(), options);
  }

  /** Closes the connections; calls in flight fail. */
  close(): void {
    for (const channel of this.#channels.values()) channel.close();
    this.#channels.clear();
    this.#services.clear();
  }

  [Symbol.dispose](): void {
    this.close();
  }
}

/** A participant's connections to one arena. Calls get a deadline unless they name one, streams an hour. */
export class Client extends Connections {
  readonly origin: string;
  readonly #registry: string;
  readonly #selector: string | undefined;

  constructor(options: ArenaOptions) {
    super(options.key, options.tls, options.deadlineMs);
    this.origin = options.origin;
    this.#registry = checkAddress(options.registry);
    this.#selector = options.selector === undefined ? undefined : checkAddress(options.selector);
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

  constructor(options: { key: Key; address: string; nodeId: string; tls?: TlsOptions; deadlineMs?: number }) {
    super(options.key, options.tls, options.deadlineMs, INFERENCE_MESSAGE_BYTES);
    this.#address = checkAddress(options.address);
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
