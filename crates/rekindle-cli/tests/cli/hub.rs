//! Models and adapters by their names, from a hub on loopback.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{Done, Scratch, command, done, golden};

#[allow(dead_code, reason = "the rest is for the tests of rekindle-hub")]
#[path = "../../../rekindle-hub/tests/hub/server.rs"]
pub(crate) mod server;

use server::{COMMIT, Server};

/// A machine with an empty cache, and the hub that it asks: `org/model` is the golden `qwen3-tied`, `org/adapter` one
/// of its adapters.
struct Machine {
    hub: Server,
    home: TempDir,
}

impl Machine {
    fn new() -> Self {
        let read = |path: &str| fs::read(golden("qwen3-tied").join(path)).unwrap();
        let (config, weights) = (read("config.json"), read("model.safetensors"));
        let hub =
            Server::start(&[("README.md", b"# A model"), ("config.json", &config), ("model.safetensors", &weights)]);
        let mut adapter: Value = serde_json::from_slice(&read("adapters/qv-rslora/adapter_config.json")).unwrap();
        adapter["base_model_name_or_path"] = json!("org/model");
        let factors = read("adapters/qv-rslora/adapter_model.safetensors");
        let adapter = adapter.to_string();
        // As Unsloth uploads them, with the configuration of the base.
        let files = [("adapter_config.json", adapter.as_bytes()), ("adapter_model.safetensors", &factors)];
        hub.add("org/adapter", &[&files[..], &[("config.json", &config)]].concat());
        Self { hub, home: tempfile::tempdir().unwrap() }
    }

    fn command(&self, line: &str) -> Command {
        let mut command = command();
        command.env("HF_ENDPOINT", &self.hub.endpoint).env("HF_HOME", self.home.path()).args(line.split_whitespace());
        command
    }

    fn run(&self, line: &str) -> Done {
        done(&mut self.command(line))
    }

    fn offline(&self, line: &str) -> Done {
        done(self.command(line).env("HF_HUB_OFFLINE", "1"))
    }

    /// Returns the directory of `org/model` in the cache.
    fn snapshot(&self) -> PathBuf {
        self.home.path().join("hub/models--org--model/snapshots").join(COMMIT)
    }
}

fn eval(model: &str) -> String {
    format!("eval --device cpu --json --data {} --model {model}", golden("qwen3-tied/rows.jsonl").display())
}

/// Returns the output of the same command for the files on disk.
fn on_disk(more: &str) -> Value {
    crate::run(&format!("{} {more}", eval(&golden("qwen3-tied").display().to_string()))).json()
}

#[test]
fn a_model_by_its_name_once_downloaded() {
    let machine = Machine::new();
    let line = eval("org/model");
    let first = machine.run(&line).ok();
    assert!(first.stderr.contains("downloading ") && first.stderr.contains("\ndownloaded\n"), "{}", first.stderr);
    assert_eq!(first.json(), on_disk(""));
    machine.hub.requests();

    let again = machine.run(&line).ok();
    assert!(!again.stderr.contains("download"), "{}", again.stderr);
    assert_eq!(machine.hub.requests().len(), 1, "whether the branch has moved");
    assert_eq!(machine.offline(&line).json(), on_disk(""));
    assert_eq!(machine.run(&format!("{line} --local-files-only")).json(), on_disk(""));
    assert_eq!(machine.run(&format!("{line} --revision {COMMIT}")).json(), on_disk(""));
    assert!(machine.hub.requests().is_empty());

    // The hub is gone, and the user is told what is taken instead.
    let alone = done(machine.command(&line).env("HF_ENDPOINT", "http://127.0.0.1:9")).ok();
    assert!(alone.stderr.contains(&format!("using commit {COMMIT} from the cache")), "{}", alone.stderr);
    assert_eq!(alone.json(), on_disk(""));
}

#[test]
fn a_directory_comes_before_a_name() {
    let machine = Machine::new();
    let scratch = tempfile::tempdir().unwrap();
    let here = scratch.path().join("org/model");
    fs::create_dir_all(&here).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(golden("qwen3-tied").join(file), here.join(file)).unwrap();
    }
    assert_eq!(done(machine.command(&eval("org/model")).current_dir(scratch.path())).json(), on_disk(""));
    assert!(machine.hub.requests().is_empty());
}

#[test]
fn an_adapter_by_its_name_and_in_the_place_of_a_model() {
    let machine = Machine::new();
    let expected = on_disk(&format!("--adapter {}", golden("qwen3-tied/adapters/qv-rslora").display()));
    assert_ne!(expected, on_disk(""));
    assert_eq!(machine.run(&eval("org/model --adapter org/adapter")).json(), expected);
    let alone = machine.run(&eval("org/adapter")).ok();
    assert!(alone.stderr.contains("adapter ") && alone.stderr.contains(" on "), "{}", alone.stderr);
    assert_eq!(alone.json(), expected);
    assert_eq!(machine.offline(&eval("org/adapter")).json(), expected);
    machine
        .run(&eval("org/adapter --adapter org/adapter"))
        .fails(2, &["--model org/adapter is an adapter", "omit --adapter"]);
}

#[test]
fn a_run_trains_what_a_name_stands_for_and_names_it() {
    let (machine, scratch) = (Machine::new(), Scratch::new());
    let train = |more: &str| machine.run(&format!("train {} --overwrite {more}", scratch.path("run.toml").display()));
    train(&format!("model=org/model model.revision={COMMIT}")).ok();
    let (run_file, adapter) = (scratch.path("out/run.toml"), scratch.path("out/adapter"));
    let resolved = fs::read_to_string(&run_file).unwrap();
    assert!(resolved.contains("name_or_path = \"org/model\"") && resolved.contains(COMMIT), "{resolved}");
    let config: Value = serde_json::from_slice(&fs::read(adapter.join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!((&config["base_model_name_or_path"], &config["revision"]), (&json!("org/model"), &json!(COMMIT)));
    // The directory is enough to find the base again.
    let adapted = machine.offline(&eval(&adapter.display().to_string())).json();
    assert_eq!(
        adapted,
        machine.offline(&eval(&format!("org/model --revision {COMMIT} --adapter {}", adapter.display()))).json()
    );
    assert_ne!(adapted, on_disk(""));

    // Training goes on with an adapter, wherever it is named.
    let weights = || fs::read(scratch.path("out/adapter/adapter_model.safetensors")).unwrap();
    let rest = "train.learning_rate=1e-3";
    train(&format!("model=org/adapter lora={{}} {rest}")).ok();
    let by_model = weights();
    train(&format!("model=org/model lora={{init_from=\"org/adapter\"}} {rest}")).ok();
    assert!(weights() == by_model, "the same run");
    let (rank, both) =
        ("[lora] contradicts the adapter in org/adapter: r = 2", "is an adapter, which the run continues");
    train("model=org/adapter").fails(2, &[rank, "set name_or_path to its base"]);
    train("model=org/adapter lora={init_from=\"org/adapter\"}").fails(2, &[both]);
    train("model=org/adapter model.full_finetuning=true").fails(2, &["[lora] and full_finetuning"]);
}

#[test]
fn inspect_quantize_and_merge_take_names() {
    let (machine, scratch) = (Machine::new(), tempfile::tempdir().unwrap());
    let out = |name: &str| scratch.path().join(name).display().to_string();
    let facts = machine.run("inspect --json org/model").json();
    assert_eq!(facts, crate::run(&format!("inspect --json {}", golden("qwen3-tied").display())).json());
    let adapter = machine.run("inspect --json org/adapter").json();
    assert_eq!(adapter["base_model_name_or_path"], "org/model");
    let local = crate::run(&format!("inspect --json {}", golden("qwen3-tied/adapters/qv-rslora").display())).json();
    assert_eq!((&adapter["tensors"], &adapter["bytes"]), (&local["tensors"], &local["bytes"]));
    // Weights stay on the hub, but for what a header's reader asks for at once.
    let requests = machine.hub.requests();
    let transfers: Vec<_> = requests.iter().filter(|r| r.starts_with("GET") && r.contains("signature")).collect();
    assert!(transfers.len() == 2 && transfers.iter().all(|r| r.contains(" bytes=0-")), "{requests:?}");
    assert!(!machine.snapshot().join("model.safetensors").exists());
    machine.offline("inspect org/model").fails(5, &["HF_HUB_OFFLINE is set", "lacks its weights"]);

    machine.run(&format!("quantize --model org/model --to int8 --out {}", out("int8"))).ok();
    assert_eq!(machine.run(&eval(&out("int8"))).json(), on_disk("--load-in-8bit"));

    machine.run(&format!("merge org/adapter --out {} --local-files-only", out("none"))).fails(5, &["org/adapter: "]);
    machine
        .run(&format!("merge org/adapter --out {} --revision v9", out("none")))
        .fails(5, &["org/adapter: ", "\"v9\""]);
    let elsewhere = format!("--cache-dir {} --revision {COMMIT}", out("cache"));
    machine.run(&format!("merge org/adapter --out {} {elsewhere}", out("pinned"))).ok();
    assert!(Path::new(&out("cache")).join("models--org--adapter").exists() && !Path::new(&out("none")).exists());
    machine.run(&format!("merge org/adapter --out {} --verify", out("merged"))).ok();
    assert_eq!(
        fs::read(Path::new(&out("merged")).join("model.safetensors")).unwrap(),
        fs::read(Path::new(&out("pinned")).join("model.safetensors")).unwrap()
    );
    let merged = machine.run(&eval(&out("merged"))).json()["loss"].as_f64().unwrap();
    let adapted = machine.run(&eval("org/adapter")).json()["loss"].as_f64().unwrap();
    // What f32 sums in another order differ by.
    assert!((merged - adapted).abs() <= 1e-5 * adapted, "{merged} and {adapted}");
}

#[test]
fn what_the_hub_does_not_give_is_5() {
    let machine = Machine::new();
    machine.run(&eval("org/modle")).fails(5, &["org/modle: ", "has no such model", "check the spelling"]);
    machine.run(&eval("qwen3")).fails(5, &["qwen3: there is no such directory", "organization/model"]);
    machine.run(&eval("no/such/model")).fails(1, &["\"no/such/model\": there is no such directory"]);
    machine
        .run(&eval("tests/modle"))
        .fails(1, &["\"tests/modle\": there is no such directory in \"tests\"; as a name"]);
    machine.run(&eval("org/model --revision v9")).fails(5, &["no branch, tag or commit \"v9\"", "\"main\""]);
    machine
        .offline(&eval("org/model"))
        .fails(5, &["org/model: there is no such directory", "HF_HUB_OFFLINE is set", "unset it"]);
    machine.run(&eval("org/model --local-files-only")).fails(5, &["local_files_only is set"]);
    crate::run(&eval("org/model"))
        .fails(5, &["org/model: there is no such directory", "cannot reach http://127.0.0.1:9", "check the network"]);

    machine.hub.add("org/pickled", &[("config.json", b"{}"), ("pytorch_model.bin", b"pickled")]);
    machine.run(&eval("org/pickled")).fails(5, &["weights are pickled (\"pytorch_model.bin\")", "safetensors"]);
    machine.hub.hub().is_gated = true;
    machine.run(&eval("org/model")).fails(5, &["org/model: it is gated", "accept its licence at", "HF_TOKEN"]);
    let scratch = Scratch::new();
    let train = format!("train {} model=org/model", scratch.path("run.toml").display());
    machine.run(&train).fails(5, &["org/model: it is gated"]);
    machine.run(&format!("{train} model.token=hf_mine")).fails(5, &["has not been accepted with this token"]);
    assert!(!scratch.path("out").exists() && !machine.snapshot().join("config.json").exists());
}

#[test]
fn an_adapter_without_its_base_says_so() {
    let machine = Machine::new();
    let config = br#"{"peft_type": "LORA", "base_model_name_or_path": "org/gone"}"#;
    machine.hub.add("org/orphan", &[("adapter_config.json", config), ("adapter_model.safetensors", b"")]);
    let parts = ["the base model of the adapter org/orphan: org/gone: ", "to use another base, pass it as the model"];
    machine.run(&eval("org/orphan")).fails(5, &parts);
    // The path of another machine.
    let config = br#"{"peft_type": "LORA", "base_model_name_or_path": "/kaggle/model"}"#;
    machine.hub.add("org/stray", &[("adapter_config.json", config), ("adapter_model.safetensors", b"")]);
    machine.run(&eval("org/stray")).fails(1, &["the base model of the adapter org/stray: ", "/kaggle/model"]);
}

#[test]
fn the_cache_is_listed_and_pruned() {
    let machine = Machine::new();
    assert!(machine.run("cache ls").ok().stdout.contains("0 models in "));
    machine.run(&eval("org/adapter")).ok();
    let listed = machine.run("cache ls").ok().stdout;
    for part in ["org/adapter\n", "org/model\n", COMMIT, "2 files  main\n", "3 files  main\n", "2 models in "] {
        assert!(listed.contains(part), "{part}: {listed}");
    }
    let lines: Vec<Value> =
        machine.run("cache ls --json").ok().stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let size = |file: &str| fs::metadata(golden("qwen3-tied").join(file)).unwrap().len();
    let bytes = size("config.json") + size("model.safetensors");
    assert_eq!((&lines[1]["name"], &lines[1]["bytes"]), (&json!("org/model"), &json!(bytes)));
    assert_eq!(lines[1]["revisions"][0]["references"], json!(["main"]));

    let blobs = machine.home.path().join("hub/models--org--model/blobs");
    fs::write(blobs.join("half.incomplete"), [0; 1500]).unwrap();
    assert!(machine.run("cache ls").ok().stdout.contains("org/model, 1.5 kB of them incomplete\n"));
    assert_eq!(machine.run("cache prune").ok().stdout, "org/model\n1.5 kB are free now\n");
    assert_eq!(machine.run("cache prune").ok().stdout, "0 B are free now\n");
    let place = format!("--cache-dir {}", machine.home.path().join("hub").display());
    let pruned = crate::run(&format!("cache prune org/adapter {place}")).ok().stdout;
    assert!(pruned.starts_with("org/adapter\n") && pruned.ends_with(" are free now\n"), "{pruned}");
    assert!(Path::new(&blobs).exists() && machine.offline(&eval("org/model")).code == 0);
    machine.run("cache prune org/adapter").fails(5, &["org/adapter: it is not in the cache at "]);
}

#[test]
fn rows_by_the_name_of_their_dataset() {
    let (machine, scratch) = (Machine::new(), Scratch::new());
    let rows =
        fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../rekindle-data/goldens/parquet/ids.parquet")).unwrap();
    let held_out = b"{\"input_ids\": [1, 2, 3]}\n";
    let files: [(&str, &[u8]); 2] = [("data/train-00000-of-00001.parquet", &rows), ("data/test.jsonl", held_out)];
    machine.hub.add("datasets/org/rows", &files);
    machine.hub.add("datasets/org/lines", &[("train.jsonl", held_out), ("test.jsonl", held_out)]);
    let train = |more: &str| {
        let file = scratch.path("run.toml").display().to_string();
        machine.run(&format!("train {file} --overwrite data.train=org/rows {more}"))
    };
    let done = train("").ok();
    assert!(done.stderr.contains("org/rows: 80 rows (input_ids), 200 tokens"), "{}", done.stderr);
    let both = train("data.eval=org/lines").ok();
    assert!(both.stderr.contains("org/lines: 1 row ("), "{}", both.stderr);
    let asked: Vec<_> = machine.hub.requests().into_iter().filter(|request| request.contains("org/lines")).collect();
    assert!(
        asked.iter().all(|request| !request.contains("train.jsonl")),
        "only the split that is evaluated: {asked:?}"
    );

    train("data.split=dev").fails(5, &["org/rows: it has no split \"dev\"; it has \"train\""]);
    train("data.subset=de").fails(5, &["org/rows: it has no subset \"de\"; it has none"]);
    train("data.revision=v9").fails(5, &["org/rows: it has no branch, tag or commit \"v9\""]);
    let on_disk = format!("data.train={} data.split=train", golden("qwen3-tied/rows.jsonl").display());
    machine
        .run(&format!("train {} --overwrite {on_disk}", scratch.path("run.toml").display()))
        .fails(2, &["split = \"train\" selects files of a directory or of a dataset on the hub", "rows.jsonl"]);
    crate::run(&format!("train {} --overwrite data.train=org/none", scratch.path("run.toml").display())).fails(
        5,
        &["org/none: no such file or directory; as a dataset on the hub: ", "cannot reach http://127.0.0.1:9"],
    );
}
