import com.google.protobuf.ByteString;
import io.grpc.CallCredentials;
import io.grpc.ManagedChannel;
import io.grpc.ManagedChannelBuilder;
import io.grpc.Metadata;
import io.grpc.StatusRuntimeException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.GeneralSecurityException;
import java.security.KeyFactory;
import java.security.MessageDigest;
import java.security.PrivateKey;
import java.security.Signature;
import java.security.spec.PKCS8EncodedKeySpec;
import java.time.Instant;
import java.util.Arrays;
import java.util.Base64;
import java.util.HexFormat;
import java.util.UUID;
import java.util.concurrent.Executor;
import java.util.concurrent.TimeUnit;
import org.example.tiltyard.registry.v1.JoinTaskRequest;
import org.example.tiltyard.registry.v1.ListTasksRequest;
import org.example.tiltyard.registry.v1.MembershipServiceGrpc;
import org.example.tiltyard.registry.v1.ParticipantServiceGrpc;
import org.example.tiltyard.registry.v1.RegisterParticipantRequest;
import org.example.tiltyard.registry.v1.TaskServiceGrpc;
import org.example.tiltyard.type.v1.Envelope;
import org.example.tiltyard.type.v1.JoinStatement;
import org.example.tiltyard.type.v1.Role;

/**
 * Registers a key's holder in an arena, lists its tasks, and joins one as a training node.
 *
 * <p>Arguments: address of the registry, the key's PEM file, the participant's public key in hex
 * (`tiltyard key show` prints both id and public key), the task.
 */
public final class Example {
    private static final String ORIGIN = "tiltyard.local";

    /** An Ed25519 key and the id of the participant who holds it. */
    record Holder(PrivateKey key, byte[] publicKey, String id) {
        static Holder load(Path pem, byte[] publicKey) throws Exception {
            String text = Files.readString(pem).replaceAll("-----[A-Z ]+-----|\\s", "");
            byte[] der = Base64.getDecoder().decode(text);
            PrivateKey key = KeyFactory.getInstance("Ed25519").generatePrivate(new PKCS8EncodedKeySpec(der));
            byte[] digest = MessageDigest.getInstance("SHA-256").digest(publicKey);
            return new Holder(key, publicKey, HexFormat.of().formatHex(digest).substring(0, 40));
        }

        byte[] sign(byte[] message) throws GeneralSecurityException {
            Signature signature = Signature.getInstance("Ed25519");
            signature.initSign(key);
            signature.update(message);
            return signature.sign();
        }

        /** A JWT (EdDSA) for one audience, good for four minutes. */
        String token(String audience, Instant now) throws GeneralSecurityException {
            Base64.Encoder base64 = Base64.getUrlEncoder().withoutPadding();
            String header = String.format(
                    "{\"alg\":\"EdDSA\",\"typ\":\"JWT\",\"jwk\":{\"kty\":\"OKP\",\"crv\":\"Ed25519\",\"x\":\"%s\"}}",
                    base64.encodeToString(publicKey));
            String claims = String.format(
                    "{\"sub\":\"%s\",\"aud\":\"%s\",\"iat\":%d,\"exp\":%d}",
                    id, audience, now.getEpochSecond(), now.getEpochSecond() + 240);
            String signed = base64.encodeToString(header.getBytes(StandardCharsets.UTF_8)) + "."
                    + base64.encodeToString(claims.getBytes(StandardCharsets.UTF_8));
            return signed + "." + base64.encodeToString(sign(signed.getBytes(StandardCharsets.UTF_8)));
        }

        /** A statement in a DSSE envelope. */
        Envelope envelope(String kind, byte[] payload) throws GeneralSecurityException {
            String type = "application/vnd.tiltyard." + kind + ".v1+protobuf";
            byte[] head = ("DSSEv1 " + type.length() + " " + type + " " + payload.length + " ")
                    .getBytes(StandardCharsets.UTF_8);
            byte[] signed = Arrays.copyOf(head, head.length + payload.length);
            System.arraycopy(payload, 0, signed, head.length, payload.length);
            return Envelope.newBuilder()
                    .setPayloadType(type)
                    .setPayload(ByteString.copyFrom(payload))
                    .setSignature(ByteString.copyFrom(sign(signed)))
                    .setPublicKey(ByteString.copyFrom(publicKey))
                    .build();
        }
    }

    /** Puts a fresh token on every call; a real client keeps one until less than a minute of it is left. */
    static final class Bearer extends CallCredentials {
        private static final Metadata.Key<String> AUTHORIZATION =
                Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER);
        private final Holder holder;

        Bearer(Holder holder) {
            this.holder = holder;
        }

        @Override
        public void applyRequestMetadata(RequestInfo call, Executor executor, MetadataApplier applier) {
            executor.execute(() -> {
                try {
                    Metadata headers = new Metadata();
                    headers.put(AUTHORIZATION, "Bearer " + holder.token(ORIGIN + "/registry", Instant.now()));
                    applier.apply(headers);
                } catch (GeneralSecurityException error) {
                    applier.fail(io.grpc.Status.UNAUTHENTICATED.withCause(error));
                }
            });
        }

        @Override
        public void thisUsesUnstableApi() {}
    }

    public static void main(String[] arguments) throws Exception {
        Holder me = Holder.load(Path.of(arguments[1]), HexFormat.of().parseHex(arguments[2]));
        String task = arguments[3];
        ManagedChannel channel = ManagedChannelBuilder.forTarget(arguments[0]).usePlaintext().build();
        try {
            Bearer bearer = new Bearer(me);
            ParticipantServiceGrpc.newBlockingStub(channel)
                    .withCallCredentials(bearer)
                    .withDeadlineAfter(20, TimeUnit.SECONDS)
                    .registerParticipant(RegisterParticipantRequest.newBuilder()
                            .setDisplayName("Duke")
                            .setRequestId(UUID.randomUUID().toString())
                            .build());
            TaskServiceGrpc.newBlockingStub(channel)
                    .withCallCredentials(bearer)
                    .withDeadlineAfter(20, TimeUnit.SECONDS)
                    .listTasks(ListTasksRequest.getDefaultInstance())
                    .getTasksList()
                    .forEach(each -> System.out.println(each.getName() + " " + each.getState()));
            JoinStatement statement = JoinStatement.newBuilder()
                    .setOrigin(ORIGIN)
                    .setTask(task)
                    .setParticipant("participants/" + me.id())
                    .setRole(Role.ROLE_TRAINING_NODE)
                    .build();
            var joined = MembershipServiceGrpc.newBlockingStub(channel)
                    .withCallCredentials(bearer)
                    .withDeadlineAfter(20, TimeUnit.SECONDS)
                    .joinTask(JoinTaskRequest.newBuilder()
                            .setStatement(me.envelope("join", statement.toByteArray()))
                            .setRequestId(UUID.randomUUID().toString())
                            .build());
            System.out.println(joined.getMember().getName() + " " + joined.getMember().getState());
        } catch (StatusRuntimeException error) {
            // Reason, fields and waits are in google.rpc details: io.grpc.protobuf.StatusProto.fromThrowable(error).
            System.err.println(error.getStatus());
            System.exit(1);
        } finally {
            channel.shutdownNow();
        }
    }
}
