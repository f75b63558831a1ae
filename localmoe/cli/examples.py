"""What `--help` and docs/commands show of each command: lines that can be typed as they stand, and what they do."""

from __future__ import annotations

Example = tuple[str, str]

EXAMPLES: dict[str, tuple[Example, ...]] = {
    "": (("To begin", "localmoe run demo 'Tell me a story about a dragon'"),),
    "run": (
        ("Ask one thing", "localmoe run demo 'Tell me a story about a fox'"),
        ("What is piped in stands under the prompt", "git diff | localmoe run deepseek-v2-lite-chat 'Review this:'"),
        ("Files are named in the prompt", "localmoe run demo 'What do they share?' -f notes.txt -f plan.txt"),
        ("The same answer each time", "localmoe run demo 'A story about the sea' --temp 0.8 --seed 1 -n 100"),
        ("Only a number of it", "localmoe run demo 'Hi' --json | jq .completion_tokens"),
        ("Why it was as fast as it was", "localmoe run demo 'Tell me a story' --explain-speed"),
        ("A saved prompt", "localmoe run demo --template translate --param to=French 'Good morning'"),
        ("Many prompts, one a line", "localmoe run demo --jsonl prompts.jsonl -n 50 > answers.jsonl"),
        ("Text to go on from, no chat", "localmoe run demo --raw 'Once upon a time' -n 40"),
    ),
    "chat": (
        ("Talk; what is not here is downloaded first, once asked", "localmoe chat deepseek-v2-lite-chat"),
        ("With a manner", "localmoe chat demo --system 'Answer in one sentence.' --temp 0.7"),
        ("Half the memory for the context", "localmoe chat deepseek-v2-lite-chat --cache-dtype int8 --ctx 32768"),
    ),
    "pull": (
        ("Download; the same command goes on after a break", "localmoe pull deepseek-v2-lite-chat"),
        ("One commit of a repository", "localmoe pull deepseek-ai/DeepSeek-V2-Lite-Chat --revision main"),
        ("By way of a mirror", "HF_ENDPOINT=https://hub.example.org localmoe pull deepseek-v2-lite-chat"),
    ),
    "quantize": (
        ("Once, after pull", "localmoe quantize deepseek-v2-lite-chat"),
        ("The smallest", "localmoe quantize deepseek-v2-lite-chat --recipe compact"),
        ("Slower, and less is lost", "localmoe quantize demo --method auto"),
        ("From and to directories of your own", "localmoe quantize ./my-checkpoint -o ./my-checkpoint-4bit"),
    ),
    "eval": (
        ("Perplexity on a text", "localmoe eval demo --text README.md"),
        ("What 4 bits cost", "localmoe eval demo --text README.md --reference demo:source"),
    ),
    "bench": (
        ("Speed, and where the time goes", "localmoe bench demo"),
        ("After a long prompt", "localmoe bench demo -p 256 -n 64 --context 128"),
        ("Where a token's time goes", "localmoe bench demo --explain-speed"),
        ("One kernel tier against another", "localmoe bench demo --kernels portable --json"),
    ),
    "plan": (
        ("Before a download", "localmoe plan deepseek-v2-lite-chat"),
        ("For another machine", "localmoe plan deepseek-r1 --ram 192GiB --vram 24GiB"),
        ("With a long context", "localmoe plan deepseek-v2-lite-chat:compact --ctx 32768 --cache-dtype int8"),
    ),
    "doctor": (
        ("Measure this machine", "localmoe doctor"),
        ("For a script", "localmoe doctor --json"),
    ),
    "list": (
        ("What is here", "localmoe list"),
        ("Names alone", "localmoe list --json | jq -r '.models[] | .name + \":\" + .recipe'"),
    ),
    "show": (
        ("What a model is, and what 4 bits cost it", "localmoe show demo"),
        ("Its source", "localmoe show demo:source"),
    ),
    "verify": (
        ("Check every file", "localmoe verify demo"),
        ("Those that were downloaded", "localmoe verify demo:source"),
    ),
    "rm": (
        ("One artifact", "localmoe rm demo:compact"),
        ("All of a name", "localmoe rm demo --all"),
    ),
    "config": (
        ("The model where none is named", "localmoe config set model deepseek-v2-lite-chat"),
        ("A name of your own", "localmoe config set alias.fast deepseek-v2-lite-chat:compact"),
        ("Every chat so", "localmoe config set chat.system 'Answer in one sentence.'"),
        ("Everything that can be set", "localmoe config list --all"),
    ),
    "config list": (("What is set", "localmoe config list"), ("What can be", "localmoe config list --all")),
    "config get": (("One value, for a script", "localmoe config get alias.fast"),),
    "config set": (
        ("A number", "localmoe config set sampling.temperature 0.7"),
        ("Of one command alone", "localmoe config set run.max_tokens 400"),
        ("A list", "localmoe config set run.stop END STOP"),
    ),
    "config unset": (("Back to the default", "localmoe config unset sampling.temperature"),),
    "config path": (("To keep a copy", 'cp "$(localmoe config path)" config.toml'),),
    "config edit": (("With an editor of your choice", "EDITOR=nano localmoe config edit"),),
    "sessions": (
        ("Keep a conversation", "localmoe chat demo --session dragons"),
        ("Go on with it in a script", "localmoe run demo --session dragons 'And then?'"),
        ("What is kept", "localmoe sessions"),
        ("What was said", "localmoe sessions show dragons"),
        ("Forget it", "localmoe sessions rm dragons"),
    ),
    "templates": (
        ("Save a prompt", "localmoe templates add translate 'Translate into {to}: {input}' --param to=English"),
        ("Use it", "localmoe run demo --template translate --param to=French 'Good morning'"),
        ("On each line of a file", "localmoe run demo --template translate --jsonl lines.jsonl"),
    ),
    "templates list": (("What is saved", "localmoe templates list"),),
    "templates show": (("One of them", "localmoe templates show translate"),),
    "templates add": (
        ("From the command line", "localmoe templates add joke 'Tell a joke about {input}' --set temperature=1"),
        ("From a file, with a system prompt", "localmoe templates add review -f review.txt --system 'Be strict.'"),
    ),
    "templates edit": (("In $EDITOR", "localmoe templates edit translate"),),
    "templates rm": (("Delete it", "localmoe templates rm translate"),),
    "completion": (
        ("bash, in ~/.bashrc", 'eval "$(localmoe completion bash)"'),
        ("zsh, in ~/.zshrc after compinit", 'eval "$(localmoe completion zsh)"'),
        ("fish, once", "localmoe completion fish > ~/.config/fish/completions/localmoe.fish"),
    ),
}
