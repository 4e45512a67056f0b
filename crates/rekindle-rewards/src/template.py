import json, sys

def reward(prompts, completions, **columns):  # replace this with your TRL reward function
    return [1.0 if str(answer) in str(completion) else 0.0 for completion, answer in zip(completions, columns["answer"])]

replies, sys.stdout = sys.stdout, sys.stderr  # print() must not mix with the replies
for line in sys.stdin:
    request = json.loads(line)
    samples = request["samples"]
    chat = lambda sample: [{"role": "assistant", "content": sample["completion"]}]
    prompts = [sample["prompt"] if sample["messages"] is None else sample["messages"] for sample in samples]
    completions = [sample["completion"] if sample["messages"] is None else chat(sample) for sample in samples]
    columns = {name: [sample["row"].get(name) for sample in samples] for name in samples[0]["row"]}
    ids = [sample["completion_ids"] for sample in samples]
    scores = reward(prompts=prompts, completions=completions, completion_ids=ids, **columns)
    scores = [None if score is None else float(score) for score in scores]
    print(json.dumps({"id": request["id"], "rewards": scores}), file=replies, flush=True)
