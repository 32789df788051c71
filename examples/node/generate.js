// Makes an image from Node: streams progress, writes the file, reads the reason of an error.
// node generate.js HOST:PORT OUTPUT.png PROMPT [ADAPTER]
const fs = require('node:fs');
const path = require('node:path');
const grpc = require('@grpc/grpc-js');
const loader = require('@grpc/proto-loader');

const [server, output, prompt, adapter] = process.argv.slice(2);
const protos = process.env.LORA_PROTOS || path.join(__dirname, '..', '..', 'protos');
const definition = loader.loadSync('lora_api/v1/generation_service.proto', {
  includeDirs: [protos], keepCase: true, longs: String, enums: String, oneofs: true,
});
const { GenerationService } = grpc.loadPackageDefinition(definition).lora_api.v1;
const client = new GenerationService(server, grpc.credentials.createInsecure());

const adapters = adapter ? [{ name: adapter }] : [];
const call = client.StreamGenerate({ spec: { prompt, seed: '42', num_inference_steps: 4, adapters } });
const chunks = [];
call.on('data', (event) => {
  if (event.progress) console.log(`step ${event.progress.completed_steps}/${event.progress.total_steps}`);
  if (event.image_chunk) chunks.push(event.image_chunk.data);
  if (event.stats) console.log(`way ${event.stats.way}`);
});
call.on('end', () => chunks.length && fs.writeFileSync(output, Buffer.concat(chunks)));
call.on('error', (error) => {
  console.error(`${grpc.status[error.code]}: ${error.details}`);
  process.exitCode = 1;
});
