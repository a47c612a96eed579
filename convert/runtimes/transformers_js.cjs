// Loads a folder in transformers.js under Node as a user would and writes down what it computes.
//
// Run as `node convert/runtimes/transformers_js.cjs REQUEST ANSWER`, with NODE_PATH naming the node_modules that has
// @huggingface/transformers. Request and answer are those of convert/runtimes/transformers.py; `module_dtypes` is not answered, because a
// session does not say in what it holds its weights. What it says is which kernels ran, `kernels` (operator that reads weights -> how often
// it ran for one token), from its own profile. The request also has `predicts`, whether the model gives logits of next tokens, and `text` and
// `special_tokens`: `checks` says what share of the prompt's ids the tokenizer here gives otherwise. Exit code 3: transformers.js cannot be
// loaded.

"use strict";

const fs = require("node:fs");
const os = require("node:os");
const path = require("node:path");

// How transformers.js calls what lies under these names in onnx/ (src/utils/dtypes.js).
const DTYPES = { "": "fp32", _fp16: "fp16", _quantized: "q8", _int8: "int8", _uint8: "uint8", _q4: "q4", _q4f16: "q4f16" };
const PRODUCTS = ["MatMul", "Gemm", "DequantizeLinear", "QGemm"];

async function main(requestPath, answerPath) {
  let library;
  try {
    library = require("@huggingface/transformers");
  } catch (error) {
    console.error(`transformers.js cannot be loaded:\n${error.message.split("\n")[0]}`);
    process.exit(3);
  }
  library.env.allowRemoteModels = false;
  const request = JSON.parse(fs.readFileSync(requestPath, "utf8"));
  request.artifact = path.resolve(request.artifact); // what is relative it would look for among its own models
  const tokens = readTokens(request.tokens);
  const graph = findGraph(request.artifact);
  // Profiling would slow down what is timed, so it has a session of its own.
  const kernels = await countKernels(library, request, graph, tokens.pictures ? tokens.rows[0] : tokens.rows[0].slice(0, 1));

  const started = performance.now();
  const model = await load(library, request, graph);
  const loaded = performance.now();
  const logits = fs.openSync(request.logits, "w");
  let seconds = 0;
  let vocabulary = 0;
  for (const row of tokens.rows) {
    const began = performance.now();
    const output = await forward(library, model, row);
    seconds += (performance.now() - began) / 1000;
    const given = (!request.predicts && output.last_hidden_state) || output.logits;
    vocabulary = given.dims.at(-1);
    const rows = given.dims[1];
    if (given.dims.length === 3 && !tokens.pictures && rows !== row.length) throw new Error(`${rows} rows for ${row.length} tokens`);
    const values = Float32Array.from(given.data);
    fs.writeSync(logits, new Uint8Array(values.buffer));
  }
  fs.closeSync(logits);

  const write = async (ids, count) => {
    const output = await model.generate({ ...feeds(library, ids.map(BigInt)), max_new_tokens: count, do_sample: false, num_beams: 1 });
    return Array.from(output.data, Number).slice(graph.pair ? 1 : ids.length);
  };
  const began = performance.now();
  const generated = request.predicts ? await write(request.prompt, request.new_tokens) : [];
  const decoding = (performance.now() - began) / 1000;
  const answers = [];
  for (const ids of request.predicts ? (request.prompts ?? []) : []) answers.push(await write(ids, request.answer_tokens));
  const checks = {};
  if (!tokens.pictures) {
    const tokenizer = await library.AutoTokenizer.from_pretrained(request.artifact, { local_files_only: true });
    const ids = tokenizer(request.text, { add_special_tokens: request.special_tokens, return_tensor: false }).input_ids.map(Number);
    checks["prompt tokenized otherwise than by transformers"] = [otherwise(ids, request.prompt), 0];
  }

  const answer = {
    weight_bytes: weightBytes(graph),
    peak_bytes: peakBytes(),
    load_seconds: (loaded - started) / 1000,
    prefill_tokens_per_second: (tokens.rows.length * (tokens.pictures ? 1 : tokens.rows[0].length)) / seconds,
    decode_tokens_per_second: request.predicts ? generated.length / decoding : 0,
    generated,
    answers,
    vocabulary,
    predicts: request.predicts,
    device: "cpu",
    versions: {
      "transformers.js": library.env.version,
      "onnxruntime-node": require("onnxruntime-node/package.json").version,
      node: process.versions.node,
    },
    session: `cpu; dtype ${graph.dtype}, ${request.threads} threads`,
    kernels,
    checks,
  };
  fs.writeFileSync(answerPath, JSON.stringify(answer));
}

function load(library, request, graph, options = {}) {
  const loader = graph.pair ? library.AutoModelForSeq2SeqLM : request.predicts ? library.AutoModelForCausalLM : library.AutoModel;
  return loader.from_pretrained(request.artifact, {
    dtype: graph.dtype,
    device: "cpu",
    local_files_only: true,
    session_options: { intraOpNumThreads: request.threads, ...options },
  });
}

function feeds(library, ids) {
  const shape = [1, ids.length];
  return {
    input_ids: new library.Tensor("int64", BigInt64Array.from(ids), shape),
    attention_mask: new library.Tensor("int64", new BigInt64Array(ids.length).fill(1n), shape),
  };
}

// What an encoder-decoder reads it is told to write, but for the first token, in whose place it begins.
function forward(library, model, ids) {
  if (ids.dims) return model({ pixel_values: new library.Tensor("float32", ids.values, [1, ...ids.dims]) });
  const given = feeds(library, ids);
  if (!model.sessions.decoder_model_merged) return model(given);
  const start = BigInt(model.config.decoder_start_token_id ?? model.generation_config.decoder_start_token_id);
  const written = BigInt64Array.from([start, ...ids.slice(1)]);
  return model({ ...given, decoder_input_ids: new library.Tensor("int64", written, [1, written.length]) });
}

async function countKernels(library, request, graph, ids) {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), "octavo-js-"));
  try {
    const model = await load(library, request, graph, { enableProfiling: true, profileFilePrefix: path.join(folder, "profile") });
    await forward(library, model, ids);
    for (const session of Object.values(model.sessions)) session.endProfiling();
    await model.dispose();
    const counts = {};
    for (const name of fs.readdirSync(folder)) {
      for (const event of JSON.parse(fs.readFileSync(path.join(folder, name), "utf8"))) {
        if (event.cat !== "Node" || !event.name.endsWith("kernel_time")) continue;
        const operator = event.args.op_name;
        if (PRODUCTS.some((product) => operator.includes(product))) counts[operator] = (counts[operator] ?? 0) + 1;
      }
    }
    return counts;
  } finally {
    fs.rmSync(folder, { recursive: true, force: true });
  }
}

// The graph of a folder, or the two of an encoder-decoder, and the dtype by which transformers.js asks for it.
function findGraph(artifact) {
  const folder = path.join(artifact, "onnx");
  const names = fs.readdirSync(folder).filter((name) => name.endsWith(".onnx")).sort();
  const stems = names.length === 2 ? ["decoder_model_merged", "encoder_model"] : ["model"];
  const known = names.length === stems.length && stems.every((stem, i) => names[i].startsWith(stem));
  const dtype = DTYPES[known ? names[0].slice(stems[0].length, -".onnx".length) : undefined];
  if (dtype === undefined) throw new Error(`onnx/ has ${names.join(", ") || "no graph"}; expected one named as transformers.js names them`);
  return { folder, names, dtype, pair: stems.length === 2 };
}

// The largest resident memory of this process; maxRSS would begin with that of the process it was forked from.
function peakBytes() {
  return Number(fs.readFileSync("/proc/self/status", "utf8").match(/VmHWM:\s+(\d+)/)[1]) * 1024;
}

function weightBytes(graph) {
  const data = fs.readdirSync(graph.folder).filter((name) => graph.names.some((graphName) => name.startsWith(`${graphName}_data`)));
  return data.reduce((sum, name) => sum + fs.statSync(path.join(graph.folder, name)).size, 0);
}

// Rows of a .npy file, version 1 or 2, in C order (numpy/lib/format.py): of int64 (sequences, length) arrays of ids, of float32 (pictures,
// channels, height, width) records of `values` and `dims`.
function readTokens(file) {
  const bytes = fs.readFileSync(file);
  const wide = bytes[6] >= 2;
  const start = (wide ? 12 : 10) + (wide ? bytes.readUInt32LE(8) : bytes.readUInt16LE(8));
  const header = bytes.toString("latin1", 10, start);
  const shape = (header.match(/'shape': \(([\d, ]+)\)/)?.[1] ?? "").split(",").filter((size) => size.trim()).map(Number);
  const [count, ...dims] = shape;
  const pictures = header.includes("'<f4'") && dims.length === 3;
  const ordered = header.includes("'fortran_order': False");
  if (!ordered || !(pictures || (header.includes("'<i8'") && dims.length === 1))) throw new Error(`${file}: neither ids nor pictures`);
  const size = dims.reduce((product, extent) => product * extent, 1);
  const each = pictures ? 4 : 8;
  const row = (i) => {
    const raw = bytes.subarray(start + i * size * each, start + (i + 1) * size * each);
    const copy = raw.buffer.slice(raw.byteOffset, raw.byteOffset + raw.byteLength); // begins where a number may
    return pictures ? { values: new Float32Array(copy), dims } : Array.from(new BigInt64Array(copy));
  };
  return { rows: Array.from({ length: count }, (_, i) => row(i)), pictures };
}

function otherwise(found, expected) {
  const length = Math.max(found.length, expected.length);
  let differ = 0;
  for (let i = 0; i < length; i++) differ += found[i] !== expected[i] ? 1 : 0;
  return differ / expected.length;
}

function fail(error) {
  console.error(`transformers.js raised\n${error.name}: ${String(error.message).slice(0, 480).replaceAll("\n", " ")}`);
  process.exit(1);
}

// A data file that is not there rejects a promise that nobody holds (src/utils/model-loader.js of 4.3.1), and from_pretrained waits for ever.
process.on("unhandledRejection", fail);
main(...process.argv.slice(2)).catch(fail);
