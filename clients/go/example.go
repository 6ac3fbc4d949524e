// Registers a key's holder in an arena, lists its tasks, and joins one as a training node.
//
//	go run example.go 127.0.0.1:7401 me.pem tasks/digits
package main

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"log"
	"os"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	registry "example.com/arena/gen/tiltyard/registry/v1"
	types "example.com/arena/gen/tiltyard/type/v1"
)

const origin = "tiltyard.local"

// holder is an Ed25519 key and the id of the participant who holds it.
type holder struct {
	key ed25519.PrivateKey
	id  string
}

func load(path string) (holder, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return holder{}, err
	}
	block, _ := pem.Decode(text)
	if block == nil {
		return holder{}, fmt.Errorf("%s holds no PEM", path)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return holder{}, err
	}
	key, ok := parsed.(ed25519.PrivateKey)
	if !ok {
		return holder{}, fmt.Errorf("%s holds a key of another kind than Ed25519", path)
	}
	digest := sha256.Sum256(key.Public().(ed25519.PublicKey))
	return holder{key, hex.EncodeToString(digest[:])[:40]}, nil
}

// token is a JWT (EdDSA) for one audience, good for four minutes.
func (h holder) token(audience string, now time.Time) string {
	public := base64.RawURLEncoding.EncodeToString(h.key.Public().(ed25519.PublicKey))
	part := func(value any) string {
		text, _ := json.Marshal(value) // maps of strings and numbers always have JSON
		return base64.RawURLEncoding.EncodeToString(text)
	}
	header := part(map[string]any{"alg": "EdDSA", "typ": "JWT",
		"jwk": map[string]string{"kty": "OKP", "crv": "Ed25519", "x": public}})
	claims := part(map[string]any{"sub": h.id, "aud": audience, "iat": now.Unix(), "exp": now.Unix() + 240})
	signed := header + "." + claims
	return signed + "." + base64.RawURLEncoding.EncodeToString(ed25519.Sign(h.key, []byte(signed)))
}

// credentials put a fresh token on every call; a real client keeps one until less than a minute of it is left.
type credentials struct {
	holder   holder
	audience string
}

func (c credentials) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + c.holder.token(c.audience, time.Now())}, nil
}

func (credentials) RequireTransportSecurity() bool { return false }

// sign puts a statement into a DSSE envelope.
func (h holder) sign(kind string, statement proto.Message) (*types.Envelope, error) {
	payload, err := proto.MarshalOptions{Deterministic: true}.Marshal(statement)
	if err != nil {
		return nil, err
	}
	payloadType := "application/vnd.tiltyard." + kind + ".v1+protobuf"
	signed := fmt.Sprintf("DSSEv1 %d %s %d %s", len(payloadType), payloadType, len(payload), payload)
	return &types.Envelope{
		PayloadType: payloadType,
		Payload:     payload,
		Signature:   ed25519.Sign(h.key, []byte(signed)),
		PublicKey:   h.key.Public().(ed25519.PublicKey),
	}, nil
}

func requestID() string {
	id := make([]byte, 16)
	if _, err := rand.Read(id); err != nil {
		log.Fatal(err)
	}
	return hex.EncodeToString(id)
}

// explain adds what the server said in google.rpc details.
func explain(err error) string {
	line := err.Error()
	for _, detail := range status.Convert(err).Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			line += " [" + detail.Reason + "]"
		case *errdetails.BadRequest:
			for _, violation := range detail.FieldViolations {
				line += fmt.Sprintf(" [%s: %s]", violation.Field, violation.Description)
			}
		case *errdetails.RetryInfo:
			line += fmt.Sprintf(" [try again in %s]", detail.RetryDelay.AsDuration())
		}
	}
	return line
}

func run(address, keyFile, task string) error {
	me, err := load(keyFile)
	if err != nil {
		return err
	}
	channel, err := grpc.NewClient(address,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithPerRPCCredentials(credentials{me, origin + "/registry"}))
	if err != nil {
		return err
	}
	defer channel.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()

	register := &registry.RegisterParticipantRequest{DisplayName: "Gopher", RequestId: requestID()}
	if _, err := registry.NewParticipantServiceClient(channel).RegisterParticipant(ctx, register); err != nil {
		return err
	}
	tasks, err := registry.NewTaskServiceClient(channel).ListTasks(ctx, &registry.ListTasksRequest{})
	if err != nil {
		return err
	}
	for _, each := range tasks.Tasks {
		fmt.Println(each.Name, each.State, each.Config.DisplayName)
	}
	envelope, err := me.sign("join", &types.JoinStatement{
		Origin:      origin,
		Task:        task,
		Participant: "participants/" + me.id,
		Role:        types.Role_ROLE_TRAINING_NODE,
	})
	if err != nil {
		return err
	}
	join := &registry.JoinTaskRequest{Statement: envelope, RequestId: requestID()}
	joined, err := registry.NewMembershipServiceClient(channel).JoinTask(ctx, join)
	if err != nil {
		return err
	}
	fmt.Println(joined.Member.Name, joined.Member.State)
	return nil
}

func main() {
	if len(os.Args) != 4 {
		log.Fatal("usage: example REGISTRY KEY.pem TASK")
	}
	if err := run(os.Args[1], os.Args[2], os.Args[3]); err != nil {
		log.Fatal(explain(err))
	}
}
