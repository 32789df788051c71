// Makes an image from Node: streams progress, writes the file, reads the reason of an error, cancels in the middle.
// node generate.js [--adapter NAME] [--steps N] [--cancel-after STEP] HOST:PORT OUTPUT.png PROMPT
const fs = require('node:fs');
const path = require('node:path');
const { parseArgs } = require('node:util');
const grpc = require('@grpc/grpc-js');
const loader = require('@grpc/proto-loader');
const protobuf = require('protobufjs');

const protos = process.env.LORA_PROTOS || path.join(__dirname, '..', '..', 'protos');
const rpcProtos = process.env.RPC_PROTOS || path.join(__dirname, '..', 'protos');

const { values: options, positionals: [server, output, prompt] } = parseArgs({
  allowPositionals: true,
  options: {
    adapter: { type: 'string' },
    steps: { type: 'string', default: '4' },
    'cancel-after': { type: 'string' },
  },
});
const cancelAfter = Number(options['cancel-after'] || Infinity);

const definition = loader.loadSync('lora_api/v1/generation_service.proto', {
  includeDirs: [protos], keepCase: true, longs: String, enums: String, oneofs: true,
});
const { GenerationService } = grpc.loadPackageDefinition(definition).lora_api.v1;
// Plain text is for this machine, and what is on it goes through no proxy, whatever the environment says.
const client = new GenerationService(server, grpc.credentials.createInsecure(), { 'grpc.enable_http_proxy': 0 });

// Every error of the server carries a google.rpc.Status with one ErrorInfo: the reason is made for programs.
function errorInfo(error) {
  const [bytes] = error.metadata.get('grpc-status-details-bin');
  if (!bytes) return null; // made here, not by the server: a cancel, or no connection
  const root = new protobuf.Root();
  root.resolvePath = (origin, target) => path.join(rpcProtos, target);
  root.loadSync(['google/rpc/status.proto', 'google/rpc/error_details.proto']);
  const status = root.lookupType('google.rpc.Status').decode(bytes);
  const found = status.details.find((detail) => detail.type_url.endsWith('/google.rpc.ErrorInfo'));
  return found ? root.lookupType('google.rpc.ErrorInfo').decode(found.value) : null;
}

const spec = {
  prompt, seed: '42', num_inference_steps: Number(options.steps),
  adapters: options.adapter ? [{ name: options.adapter }] : [],
};
const call = client.StreamGenerate({ spec }); // a Metadata with `authorization`, and { deadline }, belong here
const chunks = [];
call.on('data', (event) => {
  if (event.progress) {
    const { completed_steps: step, total_steps: steps } = event.progress;
    console.log(`step ${step}/${steps}`);
    // The server stops within a step and frees what the request held; what arrives from here on is left over.
    if (step >= cancelAfter) call.cancel();
  }
  if (event.image_chunk) chunks.push(event.image_chunk.data);
  if (event.stats) console.log(`way ${event.stats.way}`);
});
call.on('status', ({ code }) => code === grpc.status.OK && fs.writeFileSync(output, Buffer.concat(chunks)));
call.on('error', (error) => {
  console.error(`code ${error.code}: ${error.details}`);
  const info = errorInfo(error);
  if (info) console.error(`reason ${info.reason} domain ${info.domain}`);
  for (const [key, value] of Object.entries(info ? info.metadata : {})) console.error(`  ${key} = ${value}`);
  process.exitCode = error.code === grpc.status.CANCELLED && cancelAfter < Infinity ? 3 : 1;
});
