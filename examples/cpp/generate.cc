// Makes an image from C++: streams progress, writes the file, reads the reason of an error, cancels in the middle.
// generate [--adapter NAME] [--steps N] [--cancel-after STEP] HOST:PORT OUTPUT.png PROMPT
#include <getopt.h>
#include <grpcpp/grpcpp.h>

#include <cstdlib>
#include <fstream>
#include <iostream>
#include <string>

#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "lora_api/v1/generation_service.grpc.pb.h"

namespace api = lora_api::v1;

struct Options {
  std::string server, output, prompt, adapter;
  unsigned steps = 4;
  unsigned cancel_after = 0;  // in steps; 0 means never
};

Options ReadOptions(int argc, char** argv) {
  Options options;
  const option known[] = {{"adapter", required_argument, nullptr, 'a'},
                          {"steps", required_argument, nullptr, 's'},
                          {"cancel-after", required_argument, nullptr, 'c'},
                          {nullptr, 0, nullptr, 0}};
  for (int which; (which = getopt_long(argc, argv, "", known, nullptr)) != -1;) {
    if (which == 'a') options.adapter = optarg;
    if (which == 's') options.steps = std::strtoul(optarg, nullptr, 10);
    if (which == 'c') options.cancel_after = std::strtoul(optarg, nullptr, 10);
    if (which == '?') std::exit(2);
  }
  if (argc - optind != 3) {
    std::cerr << "generate [--adapter NAME] [--steps N] [--cancel-after STEP] HOST:PORT OUTPUT.png PROMPT\n";
    std::exit(2);
  }
  options.server = argv[optind];
  options.output = argv[optind + 1];
  options.prompt = argv[optind + 2];
  return options;
}

api::StreamGenerateRequest MakeRequest(const Options& options) {
  api::StreamGenerateRequest request;
  auto* spec = request.mutable_spec();
  spec->set_prompt(options.prompt);
  spec->set_seed(42);
  spec->set_num_inference_steps(options.steps);
  if (!options.adapter.empty()) spec->add_adapters()->set_name(options.adapter);
  return request;
}

// Every error of the server carries a google.rpc.Status with one ErrorInfo: the reason is made for programs.
void PrintError(const grpc::Status& status) {
  std::cerr << "code " << status.error_code() << ": " << status.error_message() << "\n";
  google::rpc::Status details;
  details.ParseFromString(status.error_details());  // grpc-status-details-bin
  for (const auto& detail : details.details()) {
    google::rpc::ErrorInfo info;
    if (!detail.UnpackTo(&info)) continue;
    std::cerr << "reason " << info.reason() << " domain " << info.domain() << "\n";
    for (const auto& [key, value] : info.metadata()) std::cerr << "  " << key << " = " << value << "\n";
  }
}

int main(int argc, char** argv) {
  const Options options = ReadOptions(argc, argv);
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);  // plain text is for this machine, which needs no proxy
  auto channel = grpc::CreateCustomChannel(options.server, grpc::InsecureChannelCredentials(), arguments);
  auto stub = api::GenerationService::NewStub(channel);

  grpc::ClientContext context;  // set_deadline and AddMetadata("authorization", "Bearer ...") belong here
  auto reader = stub->StreamGenerate(&context, MakeRequest(options));
  std::string image;
  api::StreamGenerateResponse event;
  while (reader->Read(&event)) {
    if (event.has_progress()) {
      const auto& progress = event.progress();
      std::cout << "step " << progress.completed_steps() << "/" << progress.total_steps() << std::endl;
      // The server stops within a step and frees what the request held; what is read from here on is left over.
      if (options.cancel_after && progress.completed_steps() >= options.cancel_after) context.TryCancel();
    }
    if (event.has_image_chunk()) image += event.image_chunk().data();
    if (event.has_stats()) std::cout << "way " << api::ApplicationWay_Name(event.stats().way()) << "\n";
  }
  const grpc::Status status = reader->Finish();
  if (!status.ok()) {
    PrintError(status);
    return status.error_code() == grpc::StatusCode::CANCELLED && options.cancel_after ? 3 : 1;
  }
  std::ofstream(options.output, std::ios::binary) << image;
  return 0;
}
