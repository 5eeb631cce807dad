//! Stories of dom0's command line, at its prompt.

use crate::stories::{BOOT, SHELL, SOON, answers, dom0, image, linux, md5, nonce, start, test_guest};
use anyhow::{Context, Result, ensure};
use boot::answers::{LEAVE, done, named, names, number, refused};
use boot::{FIRST_GUEST, Machine, Setup};
use serde_json::{Value, json};
use std::fs;
use std::thread;
use std::time::{Duration, Instant};
use xtask::bundle::{Bundle, Guest};
use xtask::{guest_file, kernels};

const PROMPT: &str = "dom0> ";

/// Leads from a guest's console to dom0 and types a command.
fn command(machine: &mut Machine, line: &str) -> Result<()> {
    machine.type_keys(LEAVE)?;
    machine.expect(PROMPT, SOON)?;
    machine.type_line(line)
}

/// Leads back to a guest's console.
fn console(machine: &mut Machine, name: &str) -> Result<()> {
    machine.expect(PROMPT, SOON)?;
    machine.type_line(&format!("console {name}"))?;
    machine.expect(&format!("[console of {name}"), SOON)?;
    Ok(())
}

/// A guest that is paused answers nothing; when it goes on, and goes by another name, what was typed is answered.
pub(crate) fn a_paused_guest_waits_and_a_renamed_one_answers() -> Result<()> {
    let mut machine = start("a_paused_guest_waits_and_a_renamed_one_answers", dom0("")?.guest(&linux("linux", 128)?))?;
    machine.expect(SHELL, BOOT)?;
    // Half a verb and half a name are completed.
    command(&mut machine, "pau\tli\t")?;
    console(&mut machine, "linux")?;
    let word = nonce()?;
    machine.type_line(&format!("echo {word} | md5sum"))?;
    let answered = machine.expect(&md5(&word)?, Duration::from_secs(5));
    ensure!(answered.is_err(), "a paused guest answered");
    let list = machine.ask("list")?;
    let state = named(&list, "linux")?["state"].as_str().unwrap_or("?");
    ensure!(state.contains('p'), "a paused guest is {state}");
    machine.require_answer("rename linux shop", &done("rename", "shop"))?;
    machine.require_answer("pause linux", &refused("there is no guest linux"))?;
    machine.require_answer("unpause shop", &done("unpause", "shop"))?;
    console(&mut machine, "shop")?;
    machine.expect(&md5(&word)?, SOON)?;
    // The last command but one comes back by the arrow keys: `console` is last.
    machine.type_keys(LEAVE)?;
    machine.expect(PROMPT, SOON)?;
    machine.type_keys(b"\x1b[A\x1b[A\r")?;
    machine.expect(&format!("unpause shop -j\r\n{}", done("unpause", "shop")), SOON)?;
    machine.expect(PROMPT, SOON)?;
    machine.type_line("destroy shop")?;
    machine.expect("all guests have ended", SOON)?;
    machine.finish()?.require_success()
}

/// A stock guest does what the store asks of it, and may be made again after its end.
pub(crate) fn guests_obey_the_store_and_are_made_anew() -> Result<()> {
    let bundle = dom0("")?.guest(&linux("web", 128)?).guest(&linux("other", 128)?);
    let mut machine = start("guests_obey_the_store_and_are_made_anew", bundle)?;
    machine.expect(SHELL, BOOT)?;
    machine.require_answer("reboot web", &done("reboot", "web"))?;
    machine.expect("guest web (domain 8) rebooted", SOON)?;
    machine.ask_until("domid web", |answer| *answer == json!({ "name": "web", "domid": 10 }))?;
    console(&mut machine, "web")?;
    machine.expect(SHELL, BOOT)?;
    machine.require_answer("shutdown web", &done("shutdown", "web"))?;
    machine.expect("guest web (domain 10) powered off", SOON)?;
    machine.require_answer("create web", &json!({ "done": "create", "name": "web", "domid": 11 }))?;
    console(&mut machine, "web")?;
    machine.expect(SHELL, BOOT)?;
    machine.require_answer("destroy web", &done("destroy", "web"))?;
    machine.require_answer("shutdown other", &done("shutdown", "other"))?;
    machine.expect("guest other (domain 9) powered off", SOON)?;
    machine.finish()?.require_success()
}

/// What the guest says its memory is, in KiB.
fn guest_memory(machine: &mut Machine, word: &str) -> Result<u64> {
    machine.type_line(&format!("echo {word} | md5sum; grep MemTotal /proc/meminfo"))?;
    machine.expect(&md5(word)?, SOON)?;
    machine.expect("MemTotal:", SOON)?;
    let line = machine.expect(" kB", SOON)?;
    line.trim_end_matches(" kB").trim().parse().with_context(|| format!("no memory: {line:?}"))
}

/// Asks until the guest's memory is as it should be.
fn guest_memory_becomes(machine: &mut Machine, is: impl Fn(u64) -> bool) -> Result<u64> {
    let until = Instant::now() + Duration::from_secs(60);
    loop {
        let memory = guest_memory(machine, &nonce()?)?;
        if is(memory) {
            return Ok(memory);
        }
        ensure!(Instant::now() < until, "the balloon stays at {memory} KiB");
        thread::sleep(Duration::from_millis(500));
    }
}

/// Sets the memory of the guest `linux`, and returns to its console.
fn set_memory(machine: &mut Machine, mib: u64) -> Result<()> {
    machine.require_answer(&format!("mem-set linux {mib}"), &done("mem-set", "linux"))?;
    console(machine, "linux")
}

/// An error unless dom0 lists the guest `linux` with this much memory.
fn require_listed_memory(machine: &mut Machine, mib: u64) -> Result<()> {
    let list = machine.ask("list")?;
    ensure!(named(&list, "linux")?["memory_mib"] == mib, "not {mib} MiB: {list}");
    Ok(())
}

/// Memory is taken from a guest and given back, and the guest's own numbers follow.
pub(crate) fn a_balloon_shrinks_and_grows() -> Result<()> {
    let mut machine = start("a_balloon_shrinks_and_grows", dom0("")?.guest(&linux("linux", 256)?))?;
    machine.expect(SHELL, BOOT)?;
    let before = guest_memory(&mut machine, &nonce()?)?;
    machine.require_answer("mem-set linux 9999", &refused("guest linux may have 1 to 256 MiB"))?;
    set_memory(&mut machine, 176)?;
    let less = guest_memory_becomes(&mut machine, |now| now + (80 << 10) <= before)?;
    require_listed_memory(&mut machine, 176)?;
    set_memory(&mut machine, 240)?;
    guest_memory_becomes(&mut machine, |now| now >= less + (64 << 10))?;
    require_listed_memory(&mut machine, 240)?;
    machine.require_answer("shutdown linux", &done("shutdown", "linux"))?;
    machine.expect("guest linux (domain 8) powered off", SOON)?;
    machine.finish()?.require_success()
}

/// What a guest writes by console_io is in the hypervisor's log, escaped and each line with its mark, until it is cleared;
/// nowhere else.
pub(crate) fn the_log_has_what_guests_write() -> Result<()> {
    let kernel = image("crash")?;
    let guest = Guest {
        name: "log".into(),
        memory: 16,
        vcpus: 1,
        kernel,
        ramdisk: None,
        extra: "how=log".into(),
        vif: Vec::new(),
    };
    let mut machine = start("the_log_has_what_guests_write", dom0("consoles=all")?.guest(&guest))?;
    machine.expect("log| crash: log", SOON)?;
    machine.expect("log| crash: logged", SOON)?;
    machine.type_line("dmesg")?;
    let seen = machine.expect("(d8) wiped \\x1b[2J", SOON)?;
    ensure!(seen.contains("[info] Tenon") && !seen.contains("\u{1b}[2J"), "{seen}");
    for line in ["(d8) quiet", "(d8) [error] mfn 0x1234: dropped twice", "(d8) (d7) hello from d7"] {
        ensure!(seen.lines().any(|it| it == line), "no line `{line}` in {seen}");
    }
    let lines = machine.ask("dmesg -c")?;
    let last = lines.as_array().and_then(|lines| lines.last());
    ensure!(last == Some(&json!("(d8) wiped \\x1b[2J")), "{lines}");
    machine.require_answer("dmesg", &json!([]))?;
    machine.type_line("destroy log")?;
    machine.expect("all guests have ended", SOON)?;
    machine.finish()?.require_success()
}

/// A guest that begins with less than it may have grows to all of it.
pub(crate) fn a_balloon_grows_beyond_the_beginning() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("linux.toml");
    let Guest { kernel, ramdisk, .. } = linux("linux", 128)?;
    let ramdisk = ramdisk.context("no ramdisk")?;
    let (kernel, ramdisk) = (kernel.display(), ramdisk.display());
    let files = format!("kernel = '{kernel}'\nramdisk = '{ramdisk}'\nextra = 'console=hvc0'\n");
    fs::write(&file, format!("name = 'linux'\nmemory = 128\nmaxmem = 256\n{files}"))?;
    let guests = guest_file::read(&boot::shell()?, &[file])?;
    let bundle = guests.iter().fold(dom0("")?, Bundle::described);
    let mut machine = start("a_balloon_grows_beyond_the_beginning", bundle)?;
    machine.expect(SHELL, BOOT)?;
    let before = guest_memory(&mut machine, &nonce()?)?;
    machine.require_answer("mem-set linux 257", &refused("guest linux may have 1 to 256 MiB"))?;
    set_memory(&mut machine, 256)?;
    guest_memory_becomes(&mut machine, |now| now >= before + (120 << 10))?;
    require_listed_memory(&mut machine, 256)?;
    machine.require_answer("shutdown linux", &done("shutdown", "linux"))?;
    machine.expect("guest linux (domain 8) powered off", SOON)?;
    machine.finish()?.require_success()
}

/// What the hypervisor and dom0 take, in KiB, by an answer to `info`.
fn footprint(info: &Value) -> Result<u64> {
    Ok(number(info, "hypervisor_kib")? + number(info, "dom0_kib")?)
}

/// Hypervisor and dom0 take at most 24 MiB of a machine of a GiB, and the same again after kernels have been unpacked for
/// guests that came and went.
pub(crate) fn hypervisor_and_dom0_are_small_and_stay_so() -> Result<()> {
    small_after(3)
}

/// As above, after so many rounds. `cargo xtask soak` makes fifty.
pub(crate) fn small_after(rounds: usize) -> Result<()> {
    const BAR: u64 = 24 << 10;
    let kernel = kernels::stock(&boot::shell()?, kernels::DEFAULT)?.bzimage;
    let commands = "destroy linux -j; create linux -j; ".repeat(rounds);
    let commands = format!("info -j; {commands}info -j; destroy linux -j; info -j");
    let bundle = dom0("")?.guest(&Guest { kernel, ..linux("linux", 96)? }).exec(&commands);
    let begun = Instant::now();
    let mut setup = Setup::new(bundle);
    setup.memory = 1024;
    setup.limit = Duration::from_secs(120 + 15 * rounds as u64);
    let outcome = Machine::boot(&format!("small_after_{rounds}_rounds"), &setup)?.finish()?;
    outcome.require_success()?;
    let answers = outcome.answers()?;
    let (made, others): (Vec<&Value>, Vec<&Value>) = answers.iter().partition(|answer| answer["done"] == "create");
    let infos = others.into_iter().filter(|answer| answer["done"].is_null());
    let infos: Vec<u64> = infos.map(footprint).collect::<Result<_>>()?;
    let seconds = begun.elapsed().as_secs_f64();
    println!("hypervisor and dom0: {infos:?} KiB, before and after {rounds} rounds in {seconds:.1} s");
    ensure!(infos.len() == 3 && made.len() == rounds, "{answers:?}");
    ensure!(infos.iter().all(|kib| *kib <= BAR), "more than {BAR} KiB: {infos:?}");
    ensure!(infos[0] == infos[1] && infos[2] <= infos[0], "it grows: {infos:?}");
    Ok(())
}

/// Five guests of 11 MiB on a machine of 82 MiB, where there is hardly anything left, hold all that their quotas let them hold
/// in the store: dom0 had promised it the memory when it made them, goes on answering, and has it all back when they are gone.
pub(crate) fn guests_that_fill_the_store_do_not_harm_dom0() -> Result<()> {
    const NAMES: [&str; 5] = ["one", "two", "three", "four", "five"];
    let mut bundle = dom0("")?;
    for name in NAMES {
        bundle = bundle.guest(&Guest { memory: 11, ..test_guest(name, "store", "do=fill")? });
    }
    let mut setup = Setup::new(bundle);
    setup.memory = 84;
    setup.limit = Duration::from_secs(240);
    let mut machine = Machine::boot("guests_that_fill_the_store_do_not_harm_dom0", &setup)?;
    machine.expect("store: stays", BOOT)?;
    for name in &NAMES[1..] {
        command(&mut machine, &format!("console {name}"))?;
        machine.expect("store: stays", BOOT)?;
    }
    let full = numbers(&machine.ask("info")?)?;
    let list = machine.ask("list")?;
    ensure!(names(&list) == [&["dom0"], &NAMES[..]].concat(), "{list}");
    for name in &NAMES[1..] {
        machine.require_answer(&format!("destroy {name}"), &done("destroy", name))?;
    }
    // Those that are gone leave room for one like them.
    machine.require_answer("create two", &json!({ "done": "create", "name": "two", "domid": 13 }))?;
    command(&mut machine, "console two")?;
    machine.expect("store: stays", BOOT)?;
    let few = numbers(&machine.ask("info")?)?;
    // What is told is rounded.
    ensure!(full[0] >= 5 * (full[1] - 1) && few[1] == full[1], "{full:?}, then {few:?}");
    ensure!(few[0] < full[0] && few[2] <= full[2], "{full:?}, then {few:?}");
    machine.expect(PROMPT, SOON)?;
    machine.type_line("quit")?;
    machine.finish()?.require_success()
}

/// What an answer to `info` says of dom0: KiB promised to guests, KiB for each, KiB in all.
fn numbers(info: &Value) -> Result<[u64; 3]> {
    Ok([number(info, "for_guests_kib")?, number(info, "each_guest_kib")?, number(info, "dom0_kib")?])
}

/// A guest breaks its store ring two thousand times: the operator gets a handful of lines, and one that says how many more
/// there were.
pub(crate) fn a_guest_cannot_flood_the_operator_with_warnings() -> Result<()> {
    let bundle = dom0("")?.guest(&test_guest("breaker", "store", "do=break")?);
    let mut machine = start("a_guest_cannot_flood_the_operator_with_warnings", bundle)?;
    machine.expect("store: broken 2000 times", BOOT)?;
    let outcome = machine.finish()?;
    outcome.require_success()?;
    let warnings = outcome.console.lines().filter(|line| line.contains("the store serves domain 8 no longer")).count();
    ensure!((5..10).contains(&warnings), "{warnings} warnings");
    ensure!(outcome.console.contains("more warnings about domain 8 were suppressed"), "nothing tells of the others");
    Ok(())
}

/// Two guests that write without a pause, one of them to the terminal, slow only themselves: dom0 obeys at once, a
/// stock guest answers, and those that flood can be looked at, left and destroyed.
pub(crate) fn a_flooding_console_slows_only_its_guest() -> Result<()> {
    let bundle = dom0("")?
        .guest(&test_guest("flood", "flood", "")?)
        .guest(&test_guest("log", "flood", "how=log")?)
        .guest(&linux("linux", 128)?);
    let mut machine = start("a_flooding_console_slows_only_its_guest", bundle)?;
    machine.expect("flood: line 1000,", BOOT)?;
    let list = machine.ask("list")?;
    ensure!(names(&list) == ["dom0", "flood", "log", "linux"], "{list}");
    console(&mut machine, "linux")?;
    machine.expect(SHELL, BOOT)?;
    answers(&mut machine)?;
    // The flood goes on, and dom0 is listened to while it fills the terminal.
    let list = machine.ask("list")?;
    ensure!(names(&list) == ["dom0", "flood", "log", "linux"], "{list}");
    console(&mut machine, "flood")?;
    machine.expect("bytes are lost]", SOON)?;
    for _ in 0..1000 {
        machine.expect("flood: line ", SOON)?;
    }
    machine.require_answer("domid linux", &json!({ "name": "linux", "domid": 10 }))?;
    machine.require_answer("destroy flood", &done("destroy", "flood"))?;
    machine.require_answer("destroy log", &done("destroy", "log"))?;
    console(&mut machine, "linux")?;
    answers(&mut machine)?;
    machine.type_line("poweroff -f")?;
    machine.expect("guest linux (domain 10) powered off", SOON)?;
    machine.finish()?.require_success()
}

/// While a guest of a GiB is made and destroyed, another one waits for dom0 no longer than five milliseconds of its own time:
/// for a value of the store, and until what it prints is taken. (Each is 50 million instructions of work for dom0.)
pub(crate) fn making_a_large_guest_keeps_nobody_waiting() -> Result<()> {
    const MOST_US: u64 = 5_000;
    let name = "making_a_large_guest_keeps_nobody_waiting";
    let bundle = dom0("consoles=all")?
        .guest(&test_guest("lat", "latency", "")?)
        .guest(&Guest { memory: 1024, ..test_guest("big", "hello", "")? });
    let setup = Setup { memory: 2048, limit: Duration::from_secs(240), counted: true, ..Setup::new(bundle) };
    let mut machine = Machine::boot(name, &setup)?;
    // It powers off as soon as it has begun.
    machine.expect("guest big (domain 9) powered off", BOOT)?;
    for domain in [FIRST_GUEST + 2, FIRST_GUEST + 3] {
        machine.type_line("create big")?;
        machine.expect(&format!("guest big (domain {domain}) powered off"), SOON)?;
    }
    // The first report may have begun before the end of that.
    machine.expect("latency: ", SOON)?;
    machine.expect("latency: ", SOON)?;
    let mut number = |before: &str, after: &str| -> Result<u64> {
        machine.expect(before, SOON)?;
        let number = machine.expect(after, SOON)?;
        number.trim_end_matches(after).parse().with_context(|| format!("{number:?} is no number"))
    };
    let (store, console) = (number("store ", " us")?, number("console ", " us")?);
    ensure!(store <= MOST_US, "a value of the store took {store} us, and {MOST_US} are allowed");
    ensure!(console <= MOST_US, "a byte on the console took {console} us, and {MOST_US} are allowed");
    Ok(())
}

/// A guest makes one call that takes days: dom0 is still listened to, another guest runs, and the call ends with its guest.
pub(crate) fn a_call_without_an_end_keeps_nobody_out() -> Result<()> {
    let bundle = dom0("consoles=all")?.guest(&test_guest("long", "long", "")?);
    let bundle = bundle.guest(&test_guest("log", "crash", "how=log")?);
    let mut machine = start("a_call_without_an_end_keeps_nobody_out", bundle)?;
    machine.expect("long| long: from here on a single call goes on", BOOT)?;
    machine.expect("log| crash: logged", BOOT)?;
    let list = machine.ask("list")?;
    ensure!(names(&list) == ["dom0", "long", "log"] && list[2]["domid"] == 9, "{list}");
    machine.require_answer("destroy log", &done("destroy", "log"))?;
    // The call is all that is left, and dom0 sleeps until a key is typed.
    for _ in 0..3 {
        let list = machine.ask("list")?;
        ensure!(named(&list, "long")?["domid"] == 8, "{list}");
    }
    machine.type_line("destroy long")?;
    machine.expect("all guests have ended", SOON)?;
    let outcome = machine.finish()?;
    ensure!(!outcome.console.contains("long: the call is over"), "{}", outcome.console);
    outcome.require_success()
}

/// Three guests write without a pause to a terminal that takes less than they write: dom0 shows a ring full of each in
/// turn, is listened to, and ends them. What is counted are lines, not seconds.
pub(crate) fn consoles_that_flood_take_turns() -> Result<()> {
    const NAMES: [&str; 3] = ["one", "two", "three"];
    const LINES: usize = 2000;
    // A ring has room for 27 lines; who finds the others' empty may take two in a row.
    const TURN: usize = 60;
    const WAITS: usize = 400;
    let bundle = NAMES.iter().try_fold(dom0("consoles=all")?, |bundle, name| -> Result<_> {
        Ok(bundle.guest(&test_guest(name, "flood", "")?))
    })?;
    let mut setup = Setup::new(bundle);
    setup.pace = Some(50_000);
    let mut machine = Machine::boot("consoles_that_flood_take_turns", &setup)?;
    // They are made in this order.
    machine.expect("three| flood: line 10,", SOON)?;
    let (mut lines, mut turn, mut longest, mut before) = ([0; NAMES.len()], 0, 0, NAMES.len());
    for _ in 0..LINES {
        let line = machine.expect("| flood: line ", SOON)?;
        let of = |name: &&str| line.ends_with(&format!("{name}| flood: line "));
        let who = NAMES.iter().position(of).with_context(|| format!("whose line is {line:?}?"))?;
        turn = if who == before { turn + 1 } else { 1 };
        before = who;
        lines[who] += 1;
        longest = longest.max(turn);
    }
    println!("of {LINES} lines {lines:?} are of each guest that floods, at most {longest} of one after another");
    ensure!(longest <= TURN && lines.iter().all(|count| *count >= LINES / 6), "{lines:?}, {longest} after another");
    machine.type_line("domid three -j")?;
    let waited = machine.expect("\"domid\":10}", SOON)?.matches("flood: line ").count();
    println!("{waited} lines until dom0 answers");
    ensure!(waited <= WAITS, "{waited} lines until dom0 answers");
    for name in NAMES {
        machine.type_line(&format!("destroy {name}"))?;
    }
    machine.expect("all guests have ended", SOON)?;
    machine.finish()?.require_success()
}
