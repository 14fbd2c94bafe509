// A client of the training service, written from its proto file alone. build.sh builds it.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	pb "example.com/asynctrain/v1" // what build.sh makes of the proto file
)

const usage = `
client train [--model NAME] [--size N] [--channels 1|3] [--epochs N] [--batch-size N]
             [--learning-rate X] [--seed N] [--key KEY] FOLDER
client test RUN FOLDER          what share of a folder's images the run's model names rightly
client watch [--from N] RUN     the events of a run from number N on, until it ends
client cancel RUN
client runs
client send FILE                the messages of a file to TrainModel, as they are: JSON, one in a line

A FOLDER has image files in a folder per class. A run with a KEY goes on without its client; the same command again
finds it. Answers are printed as JSON, one in a line. All commands take --address HOST:PORT and --ca FILE, the
certificate of the server's authority; the token, where one is asked for, is ASYNCTRAIN_TOKEN.`

// How much goes into one message: far below the 4 MiB that it may have.
const (
	messageImages = 1000
	messageBytes  = 1 << 20
)

var (
	errFailed = errors.New("the run has failed, or was cancelled")
	errUsage  = errors.New(strings.TrimSpace(usage))
)

type options struct {
	address, ca, model, key           string
	size, channels, epochs, batchSize uint
	seed, from                        uint64
	learningRate                      float64
}

func parse(arguments []string) (o options, rest []string) {
	flags := flag.NewFlagSet("client", flag.ExitOnError)
	flags.Usage = func() { fmt.Fprintln(os.Stderr, errUsage) }
	flags.StringVar(&o.address, "address", "127.0.0.1:50051", "")
	flags.StringVar(&o.ca, "ca", "", "")
	flags.StringVar(&o.model, "model", "lenet", "")
	flags.StringVar(&o.key, "key", "", "")
	flags.UintVar(&o.size, "size", 28, "")
	flags.UintVar(&o.channels, "channels", 1, "")
	flags.UintVar(&o.epochs, "epochs", 2, "")
	flags.UintVar(&o.batchSize, "batch-size", 64, "")
	flags.Uint64Var(&o.seed, "seed", 0, "")
	flags.Uint64Var(&o.from, "from", 0, "")
	flags.Float64Var(&o.learningRate, "learning-rate", 0.003, "")
	flags.Parse(arguments)
	return o, flags.Args()
}

func main() {
	err := run(os.Args[1:])
	if refused, ok := status.FromError(err); err != nil && ok {
		err = fmt.Errorf("%s (%d): %s", refused.Code(), refused.Code(), refused.Message())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		if errors.Is(err, errUsage) {
			os.Exit(2)
		}
		os.Exit(1)
	}
}

func run(arguments []string) error {
	if len(arguments) == 0 {
		return errUsage
	}
	o, rest := parse(arguments[1:])
	connection, err := connect(o.address, o.ca)
	if err != nil {
		return err
	}
	defer connection.Close()
	training := pb.NewTrainingClient(connection)
	ctx := context.Background()
	if token := os.Getenv("ASYNCTRAIN_TOKEN"); token != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
	}
	switch command := arguments[0]; {
	case command == "train" && len(rest) == 1:
		return train(ctx, training, o, rest[0])
	case command == "test" && len(rest) == 2:
		return test(ctx, training, rest[0], rest[1])
	case command == "watch" && len(rest) == 1:
		return watch(ctx, training, rest[0], o.from)
	case command == "cancel" && len(rest) == 1:
		return cancel(ctx, training, rest[0])
	case command == "runs" && len(rest) == 0:
		return runs(ctx, training)
	case command == "send" && len(rest) == 1:
		return send(ctx, training, rest[0])
	}
	return errUsage
}

var loopback = regexp.MustCompile(`^(localhost|127(\.\d+){3}|\[::1\]):\d+$`)

// connect returns a connection, which others can read where no authority is named.
func connect(address, ca string) (*grpc.ClientConn, error) {
	if ca != "" {
		authority, err := credentials.NewClientTLSFromFile(ca, "")
		if err != nil {
			return nil, err
		}
		return grpc.Dial(address, grpc.WithTransportCredentials(authority))
	}
	if os.Getenv("ASYNCTRAIN_TOKEN") != "" && !loopback.MatchString(address) {
		return nil, fmt.Errorf("a token is not sent to %s in clear: name its authority with --ca", address)
	}
	return grpc.Dial(address, grpc.WithInsecure())
}

// train sends as many batches as the server has given credits for, and prints the events that come meanwhile and after.
func train(ctx context.Context, training pb.TrainingClient, o options, folder string) error {
	classes, images, err := listImages(folder)
	if err != nil {
		return err
	}
	stream, err := training.TrainModel(ctx)
	if err != nil {
		return err
	}
	if err := sendTo(stream, &pb.TrainRequest{Kind: &pb.TrainRequest_Start{Start: startOf(o, classes)}}); err != nil {
		return err
	}
	batches := &batches{images: images}
	credits, stored, complete := uint32(0), uint32(0), false
	return report(stream, func(event *pb.TrainEvent) error {
		if accepted := event.GetAccepted(); accepted != nil {
			credits = accepted.Credits
			stored = accepted.NextSequence // batches that the server has from an earlier call with this key
			complete = accepted.Complete
		}
		credits += event.GetCredit().GetCredits()
		for ; credits > 0 && !complete; credits-- {
			batch, err := batches.nextFrom(stored)
			if err != nil {
				return err
			}
			if err := sendTo(stream, &pb.TrainRequest{Kind: &pb.TrainRequest_Batch{Batch: batch}}); err != nil {
				return err
			}
			complete = batch.Last
		}
		return nil
	})
}

func startOf(o options, classes []string) *pb.Start {
	size := uint32(o.size)
	return &pb.Start{
		Version:        1,
		IdempotencyKey: o.key,
		Model: &pb.Start_ReadyModel{ReadyModel: &pb.ReadyModel{
			Name:       o.model,
			ImageShape: []uint32{size, size, uint32(o.channels)},
		}},
		Classes:   classes,
		Optimizer: fmt.Sprintf(`{"name": "adamw", "learning_rate": %g}`, o.learningRate),
		Epochs:    uint32(o.epochs),
		BatchSize: uint32(o.batchSize),
		Seed:      o.seed,
	}
}

// sendTo sends a message. That the stream has ended is no error here: receiving from it will tell why.
func sendTo(stream pb.Training_TrainModelClient, request *pb.TrainRequest) error {
	if err := stream.Send(request); err != io.EOF {
		return err
	}
	return nil
}

// report prints the events of a run until its end, and hands each on.
func report(stream interface {
	Recv() (*pb.TrainEvent, error)
}, then func(*pb.TrainEvent) error) error {
	failed := false
	for {
		event, err := stream.Recv()
		if err == io.EOF && failed {
			return errFailed
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		failed = event.GetFailed() != nil
		if err := show(event); err != nil {
			return err
		}
		if err := then(event); err != nil {
			return err
		}
	}
}

func nothingElse(*pb.TrainEvent) error { return nil }

func test(ctx context.Context, training pb.TrainingClient, run, folder string) error {
	classes, images, err := listImages(folder)
	if err != nil {
		return err
	}
	right := 0
	for batches := (&batches{images: images}); len(batches.images) > 0; {
		batch, err := batches.next()
		if err != nil {
			return err
		}
		request := &pb.PredictRequest{RunId: run, Images: &pb.PredictRequest_Encoded{Encoded: batch.GetEncoded()}}
		found, err := training.Predict(ctx, request)
		if err != nil {
			return err
		}
		for index, prediction := range found.Predictions {
			if prediction.Label == classes[batch.Labels[index]] {
				right++
			}
		}
	}
	share := float64(right) / float64(len(images))
	return json.NewEncoder(os.Stdout).Encode(map[string]any{"images": len(images), "right": right, "accuracy": share})
}

func watch(ctx context.Context, training pb.TrainingClient, run string, from uint64) error {
	stream, err := training.WatchRun(ctx, &pb.WatchRunRequest{RunId: run, FromEvent: from})
	if err != nil {
		return err
	}
	return report(stream, nothingElse)
}

func cancel(ctx context.Context, training pb.TrainingClient, run string) error {
	info, err := training.CancelRun(ctx, &pb.CancelRunRequest{RunId: run})
	if err != nil {
		return err
	}
	return show(info)
}

func runs(ctx context.Context, training pb.TrainingClient) error {
	for token := ""; ; {
		page, err := training.ListRuns(ctx, &pb.ListRunsRequest{PageToken: token})
		if err != nil {
			return err
		}
		for _, info := range page.Runs {
			if err := show(info); err != nil {
				return err
			}
		}
		if token = page.NextPageToken; token == "" {
			return nil
		}
	}
}

func send(ctx context.Context, training pb.TrainingClient, file string) error {
	content, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	stream, err := training.TrainModel(ctx)
	if err != nil {
		return err
	}
	for _, line := range strings.Split(strings.TrimSpace(string(content)), "\n") {
		request := &pb.TrainRequest{}
		if err := protojson.Unmarshal([]byte(line), request); err != nil {
			return err
		}
		if err := sendTo(stream, request); err != nil {
			return err
		}
	}
	if err := stream.CloseSend(); err != nil {
		return err
	}
	return report(stream, nothingElse)
}

func show(message proto.Message) error {
	text, err := protojson.Marshal(message)
	if err == nil {
		fmt.Println(string(text))
	}
	return err
}

type image struct {
	path  string
	label int32
}

// listImages returns the files of a folder, class by class, both in alphabetical order.
func listImages(folder string) (classes []string, images []image, err error) {
	entries, err := os.ReadDir(folder)
	if err != nil {
		return nil, nil, err
	}
	for _, class := range entries {
		if !class.IsDir() {
			continue
		}
		files, err := os.ReadDir(filepath.Join(folder, class.Name()))
		if err != nil {
			return nil, nil, err
		}
		for _, file := range files {
			path := filepath.Join(folder, class.Name(), file.Name())
			images = append(images, image{path, int32(len(classes))})
		}
		classes = append(classes, class.Name())
	}
	return classes, images, nil
}

// batches cuts images into messages: the same ones whenever it is given the same files.
type batches struct {
	images   []image // that are left
	sequence uint32
}

// nextFrom returns the first of the next batches whose number is not below sequence.
func (b *batches) nextFrom(sequence uint32) (*pb.Batch, error) {
	for {
		batch, err := b.next()
		if err != nil || batch.Sequence >= sequence {
			return batch, err
		}
		if batch.Last {
			return nil, errors.New("the run of this key has more data than the folder")
		}
	}
}

func (b *batches) next() (*pb.Batch, error) {
	encoded := &pb.EncodedImages{}
	batch := &pb.Batch{Sequence: b.sequence, Images: &pb.Batch_Encoded{Encoded: encoded}}
	for bytes := 0; len(b.images) > 0 && len(batch.Labels) < messageImages; b.images = b.images[1:] {
		content, err := os.ReadFile(b.images[0].path)
		if err != nil {
			return nil, err
		}
		if bytes += len(content); bytes > messageBytes && len(batch.Labels) > 0 {
			break // it goes into the next message
		}
		encoded.Images = append(encoded.Images, content)
		batch.Labels = append(batch.Labels, b.images[0].label)
	}
	batch.Last = len(b.images) == 0
	b.sequence++
	return batch, nil
}
