// A client of the training service, written from its proto file alone.

import { readFile, readdir } from 'node:fs/promises';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs, promisify } from 'node:util';

import grpc from '@grpc/grpc-js';
import { loadSync } from '@grpc/proto-loader';

const USAGE = `
node client.mjs train [--model NAME] [--size N] [--channels 1|3] [--epochs N] [--batch-size N]
                      [--learning-rate X] [--seed N] [--key KEY] FOLDER
node client.mjs test RUN FOLDER          what share of a folder's images the run's model names rightly
node client.mjs watch [--from N] RUN     the events of a run from number N on, until it ends
node client.mjs cancel RUN
node client.mjs runs
node client.mjs send FILE                the messages of a file to TrainModel, as they are: JSON, one in a line

A FOLDER has image files in a folder per class. A run with a KEY goes on without its client; the same command again
finds it. Answers are printed as JSON, one in a line. All commands take --address HOST:PORT and --ca FILE, the
certificate of the server's authority; the token, where one is asked for, is ASYNCTRAIN_TOKEN.`;

const OPTIONS = {
  address: { type: 'string', default: '127.0.0.1:50051' },
  ca: { type: 'string' },
  model: { type: 'string', default: 'lenet' },
  size: { type: 'string', default: '28' },
  channels: { type: 'string', default: '1' },
  epochs: { type: 'string', default: '2' },
  'batch-size': { type: 'string', default: '64' },
  'learning-rate': { type: 'string', default: '0.003' },
  seed: { type: 'string', default: '0' },
  key: { type: 'string', default: '' },
  from: { type: 'string', default: '0' },
};

// How much goes into one message: far below the 4 MiB that it may have.
const MESSAGE_IMAGES = 1000;
const MESSAGE_BYTES = 2 ** 20;

// Sends as many batches as the server has given credits for, and prints the events that come meanwhile and after.
async function train(training, options, folder) {
  const { classes, images } = await listImages(folder);
  const call = training.trainModel();
  call.write({ start: startOf(options, classes) });
  const batches = batchesOf(images);
  let credits = 0;
  let stored = 0; // batches that the server has from an earlier call with this key
  let complete = false;
  for await (const event of call) {
    report(event);
    if (event.accepted) ({ nextSequence: stored = 0, complete = false } = event.accepted);
    credits += (event.accepted ?? event.credit)?.credits ?? 0;
    for (; credits > 0 && !complete; credits -= 1) {
      const batch = await nextFrom(batches, stored);
      call.write({ batch });
      complete = batch.last;
    }
  }
}

function startOf(options, classes) {
  const size = Number(options.size);
  return {
    version: 1,
    idempotencyKey: options.key,
    readyModel: { name: options.model, imageShape: [size, size, Number(options.channels)] },
    classes,
    optimizer: JSON.stringify({ name: 'adamw', learning_rate: Number(options['learning-rate']) }),
    epochs: Number(options.epochs),
    batchSize: Number(options['batch-size']),
    seed: options.seed,
  };
}

async function test(training, options, runId, folder) {
  const { classes, images } = await listImages(folder);
  let right = 0;
  for await (const { encoded, labels } of batchesOf(images)) {
    const { predictions } = await training.predict({ runId, encoded });
    right += predictions.filter(({ label }, index) => label === classes[labels[index]]).length;
  }
  print({ images: images.length, right, accuracy: right / images.length });
}

async function watch(training, { from }, runId) {
  for await (const event of training.watchRun({ runId, fromEvent: from })) report(event);
}

async function cancel(training, options, runId) {
  print(await training.cancelRun({ runId }));
}

async function runs(training) {
  let pageToken = '';
  do {
    const page = await training.listRuns({ pageToken });
    page.runs?.forEach(print);
    pageToken = page.nextPageToken;
  } while (pageToken);
}

async function send(training, options, file) {
  const lines = (await readFile(file, 'utf8')).trim().split('\n');
  const call = training.trainModel();
  lines.forEach((line) => call.write(JSON.parse(line)));
  call.end();
  for await (const event of call) report(event);
}

// Each with how many arguments it takes.
const COMMANDS = {
  train: [train, 1],
  test: [test, 2],
  watch: [watch, 1],
  cancel: [cancel, 1],
  runs: [runs, 0],
  send: [send, 1],
};

async function nextFrom(batches, sequence) {
  for (;;) {
    const { value: batch, done } = await batches.next();
    if (done) throw new Error('the run of this key has more data than the folder');
    if (batch.sequence >= sequence) return batch;
  }
}

// Yields the images in messages: the same ones whenever it is called with the same files.
async function* batchesOf(images) {
  let batch = { sequence: 0, encoded: { images: [] }, labels: [] };
  let bytes = 0;
  for (const { path, label } of images) {
    const image = await readFile(path);
    const count = batch.labels.length;
    if (count === MESSAGE_IMAGES || (count > 0 && bytes + image.length > MESSAGE_BYTES)) {
      yield { ...batch, last: false };
      batch = { sequence: batch.sequence + 1, encoded: { images: [] }, labels: [] };
      bytes = 0;
    }
    batch.encoded.images.push(image);
    batch.labels.push(label);
    bytes += image.length;
  }
  yield { ...batch, last: true };
}

// Returns the classes of a folder and its files, class by class, both in alphabetical order.
async function listImages(folder) {
  const entries = await readdir(folder, { withFileTypes: true });
  const classes = entries.filter((entry) => entry.isDirectory()).map(({ name }) => name).sort();
  const images = [];
  for (const [label, name] of classes.entries()) {
    const files = await readdir(join(folder, name));
    for (const file of files.sort()) images.push({ path: join(folder, name, file), label });
  }
  return { classes, images };
}

// Returns the service's methods: those with one answer as functions that return a promise, the others as they are.
function connect(address, ca, token) {
  if (token && !ca && !/^(localhost|127(\.\d+){3}|\[::1\]):\d+$/.test(address)) {
    throw new Error(`a token is not sent to ${address} in clear: name its authority with --ca`);
  }
  const proto = fileURLToPath(new URL('../../../asynctrain/serve/asynctrain.proto', import.meta.url));
  const { asynctrain } = grpc.loadPackageDefinition(loadSync(proto, { longs: String, enums: String }));
  const credentials = ca ? grpc.credentials.createSsl(ca) : grpc.credentials.createInsecure();
  const client = new asynctrain.v1.Training(address, credentials);
  const metadata = new grpc.Metadata();
  if (token) metadata.set('authorization', `Bearer ${token}`);
  const unary = (name) => {
    const method = promisify(client[name].bind(client));
    return (request) => method(request, metadata);
  };
  return {
    trainModel: () => client.trainModel(metadata),
    watchRun: (request) => client.watchRun(request, metadata),
    predict: unary('predict'),
    cancelRun: unary('cancelRun'),
    listRuns: unary('listRuns'),
    close: () => client.close(),
  };
}

function report(event) {
  print(event);
  if (event.failed) process.exitCode = 1;
}

function print(message) {
  console.log(JSON.stringify(message));
}

async function main([name, ...rest]) {
  const { values: options, positionals } = parseArgs({ args: rest, options: OPTIONS, allowPositionals: true });
  const [command, takes] = COMMANDS[name] ?? [];
  if (positionals.length !== takes) {
    console.error(USAGE.trim());
    process.exitCode = 2;
    return;
  }
  const ca = options.ca && (await readFile(options.ca));
  const training = connect(options.address, ca, process.env.ASYNCTRAIN_TOKEN);
  try {
    await command(training, options, ...positionals);
  } finally {
    training.close();
  }
}

try {
  await main(process.argv.slice(2));
} catch (error) {
  const status = grpc.status[error.code];
  console.error(status ? `${status} (${error.code}): ${error.details}` : error.message);
  process.exitCode = 1;
}
