//! Stories of networks with many guests, of which those with more than four are for `cargo xtask soak`.

use crate::blocks::{console, shell};
use crate::networks::{enter, value, vif};
use crate::stories::{BOOT, SOON, dom0, image};
use anyhow::{Context, Result, bail, ensure};
use boot::answers::done;
use boot::{Machine, Setup};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};
use xtask::bundle::Bundle;
use xtask::kernels;
use xtask::machine::Network;

/// How long a machine may take. Twenty guests need two minutes of a CPU to come up, and the CPU is shared.
const LIMIT: Duration = Duration::from_secs(3_600);
/// How long the guests may take to come up.
const UP: Duration = Duration::from_secs(2_400);
/// How long pings to all others may take.
const PINGED: Duration = Duration::from_secs(120);
/// Memory of the machine in MiB.
const MACHINE: u32 = 3_072;
/// Memory of a guest in MiB.
const MEMORY: u32 = 128;
/// Pings of a measurement: enough to use up what a guest may have of the CPU before others.
const TRIPS: u32 = 1_000;
/// How many times as long as when nobody does anything a round trip may take.
const TIMES: f64 = 2.0;
/// The guest of sixteen whose vif limits what it sends.
const LIMITED: &str = "g14";
/// Packets of a flood, at least. A guest may send 10,000 packets to groups in a second, and each receiver counts.
const FLOOD: u64 = 100;

/// The names of so many guests.
fn names(count: usize) -> Vec<String> {
    (1..=count).map(|number| format!("g{number:02}")).collect()
}

/// Adds stock guests with one network device each. They share a kernel and a ramdisk in the bundle.
fn crowd<'a>(bundle: Bundle, names: &[String], ramdisk: &Path, vif: impl Fn(&str) -> &'a str) -> Result<Bundle> {
    let kernel = kernels::stock(&boot::shell()?, kernels::DEFAULT)?.vmlinux;
    let mut bundle = bundle.with_file("crowd/kernel", &kernel).with_file("crowd/ramdisk", ramdisk);
    for name in names {
        let files = "kernel = 'crowd/kernel'\nramdisk = 'crowd/ramdisk'\nextra = 'console=hvc0'";
        let text = format!("name = '{name}'\n{files}\nmemory = {MEMORY}\nvif = ['{}']\n", vif(name));
        bundle = bundle.with_text(&format!("guests/{name}/config"), &text);
    }
    Ok(bundle)
}

/// A ramdisk with a program that floods.
fn ramdisk() -> Result<PathBuf> {
    let program = fs::read(image("microbench")?)?;
    kernels::ramdisk_with(&boot::shell()?, kernels::DEFAULT, &[("bin/microbench".to_owned(), program)].into())
}

/// Waits until all guests are up with the addresses that dom0 offers them, which differ, and returns the addresses.
fn addresses(machine: &mut Machine, names: &[String]) -> Result<Vec<Ipv4Addr>> {
    let until = Instant::now() + UP;
    let offered = |list: &Value, name: &str| -> Result<Ipv4Addr> {
        Ok(vif(list, name, 0)?["ip"].as_str().with_context(|| format!("{name} is offered no address"))?.parse()?)
    };
    let found = loop {
        let list = machine.ask("network-list")?;
        let found: Result<Vec<_>> = names.iter().map(|name| offered(&list, name)).collect();
        match found {
            Ok(found) => break found,
            Err(why) => ensure!(Instant::now() < until, "{why:#}: {list}"),
        }
        // A list of many devices is long, and guests wait while it is printed.
        thread::sleep(Duration::from_secs(10));
    };
    ensure!(found.iter().collect::<BTreeSet<_>>().len() == names.len(), "addresses are given twice: {found:?}");
    for (name, address) in names.iter().zip(&found) {
        enter(machine, name, "eth0")?;
        let told = value(machine, "hostname; ip -4 -o addr show dev eth0 | sed 's/.*inet //; s,/.*,,'", SOON)?;
        ensure!(told == format!("{name} {address}"), "{name} at {address} says {told:?}");
    }
    Ok(found)
}

/// Runs a program of a guest until [`quiet`] is called.
fn run(machine: &mut Machine, name: &str, program: &str) -> Result<()> {
    console(machine, name)?;
    shell(machine, &format!("{program} & echo $! > busy"))
}

/// Ends what a guest runs.
fn quiet(machine: &mut Machine, name: &str) -> Result<()> {
    console(machine, name)?;
    shell(machine, "kill $(cat busy)")
}

/// The average time of [`TRIPS`] round trips from a guest to an address, in milliseconds of the guest's clock. No packet may be
/// lost.
fn trip(machine: &mut Machine, from: &str, to: Ipv4Addr) -> Result<f64> {
    console(machine, from)?;
    let said = value(machine, &format!("ping -q -A -c {TRIPS} -W 10 {to}"), PINGED)?;
    ensure!(said.contains(&format!(" {TRIPS} packets received")), "{from} pings {to}: {said}");
    let times = said.split_once("min/avg/max = ").with_context(|| format!("no times: {said}"))?.1;
    Ok(times.split('/').nth(1).with_context(|| format!("no average: {said}"))?.parse()?)
}

/// The average time of a round trip of each of these pairs, in milliseconds.
fn trips(machine: &mut Machine, what: &str, pairs: &[(&String, Ipv4Addr)]) -> Result<Vec<f64>> {
    let times: Vec<f64> = pairs.iter().map(|(from, to)| trip(machine, from, *to)).collect::<Result<_>>()?;
    println!("round trips {what}: {times:?} ms");
    Ok(times)
}

/// The number of packets that a guest's device has received.
fn received(machine: &mut Machine, name: &str) -> Result<u64> {
    vif(&machine.ask("network-list")?, name, 0)?["received"].as_u64().context("no count of packets")
}

/// A flood: what it is called, who sends it, and to which address.
type Flood<'a> = (&'a str, &'a str, Ipv4Addr);

/// Four guests of one network: while two compute, and while one floods another, a round trip between the other two takes at
/// most twice as long as while nobody does anything.
pub(crate) fn a_flood_leaves_a_pair_its_round_trips() -> Result<()> {
    beside_floods("a_flood_leaves_a_pair_its_round_trips", &names(4), |_| "bridge=lan")
}

/// Sixteen guests of one network have addresses by DHCP, and each reaches each. While two of them compute, and while one floods
/// another, with a limit of its vif and without, or all others, a round trip between others takes at most twice as long as
/// while nobody does anything.
pub(crate) fn a_flood_leaves_others_their_round_trips(title: &str) -> Result<()> {
    beside_floods(title, &names(16), |name| if name == LIMITED { "bridge=lan,rate=1Mb/s" } else { "bridge=lan" })
}

fn beside_floods<'a>(title: &str, names: &[String], vif: impl Fn(&str) -> &'a str) -> Result<()> {
    let ramdisk = ramdisk()?;
    let [.., flooder, target] = names else { bail!("too few guests: {names:?}") };
    let bundle = crowd(dom0("")?, names, &ramdisk, vif)?;
    // By the clock of the machine, which counts instructions, times do not depend on this machine.
    let setup = Setup { memory: MACHINE, limit: LIMIT, counted: true, ..Setup::new(bundle) };
    let mut machine = Machine::boot(title, &setup)?;
    let found = addresses(&mut machine, names)?;
    let all = found.iter().map(Ipv4Addr::to_string).collect::<Vec<_>>().join(" ");
    for name in names {
        console(&mut machine, name)?;
        let pings = format!("for a in {all}; do ping -q -c 1 -W 10 $a > said || cat said; done; echo .");
        let said = value(&mut machine, &pings, PINGED)?;
        ensure!(said == ".", "{name} does not reach all others: {said}");
    }
    let pairs: Vec<_> = (0..names.len() - 2).step_by(4).take(3).map(|at| (&names[at], found[at + 1])).collect();
    let idle = trips(&mut machine, "while nobody does anything", &pairs)?;
    let mut missed = Vec::new();
    let mut judge = |what: &str, took: &[f64]| {
        for (took, idle) in took.iter().zip(&idle) {
            let most = TIMES * idle;
            missed.extend((*took > most).then(|| format!("a round trip {what}: {took} ms, at most {most} ms")));
        }
    };
    for name in [flooder, target] {
        run(&mut machine, name, "while :; do :; done")?;
    }
    let what = "while two guests compute";
    judge(what, &trips(&mut machine, what, &pairs)?);
    for name in [flooder, target] {
        quiet(&mut machine, name)?;
    }
    let (another, broadcast) = (found[names.len() - 1], Ipv4Addr::new(10, 77, 1, 255));
    let mut floods: Vec<Flood> = vec![("while a guest floods another", flooder, another)];
    if names.iter().any(|name| name == LIMITED) {
        floods.push(("while a guest floods another at 1 Mb/s", LIMITED, another));
        floods.push(("while a guest floods all others", flooder, broadcast));
    }
    for (what, from, to) in floods {
        let before = received(&mut machine, target)?;
        run(&mut machine, from, &format!("microbench flood {to}"))?;
        judge(what, &trips(&mut machine, what, &pairs)?);
        let packets = received(&mut machine, target)? - before;
        println!("{target} has received {packets} packets meanwhile");
        ensure!(packets > FLOOD, "{packets} packets are no flood");
        quiet(&mut machine, from)?;
    }
    ensure!(missed.is_empty(), "{}", missed.join("; "));
    for name in names {
        machine.require_answer(&format!("destroy {name}"), &done("destroy", name))?;
    }
    machine.finish()?.require_success()
}

/// Free ports of this machine, all different.
fn free_ports(count: usize) -> Result<Vec<u16>> {
    let bind = |_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0));
    let listeners = (0..count).map(bind).collect::<Result<Vec<_>, _>>()?;
    Ok(listeners.iter().map(|listener| Ok(listener.local_addr()?.port())).collect::<std::io::Result<_>>()?)
}

/// What a server at a port of this machine answers to a request for a file.
fn get(port: u16, file: &str) -> Result<String> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    stream.set_read_timeout(Some(SOON))?;
    write!(stream, "GET /{file} HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Twenty guests of the translated network have an address each by DHCP and reach the gateway and the host's network. A port of
/// the host leads to each of them, and there that guest answers.
pub(crate) fn twenty_guests_share_an_uplink(title: &str) -> Result<()> {
    let names = names(20);
    let ramdisk = kernels::ramdisk_for_devices(&boot::shell()?, kernels::DEFAULT)?;
    let ports = free_ports(names.len())?;
    let forward = |(name, port): (&String, &u16)| format!("{port}:{name}:80").parse().map_err(anyhow::Error::msg);
    let forwards = names.iter().zip(&ports).map(forward).collect::<Result<Vec<_>>>()?;
    let bundle = crowd(dom0("")?.forwards(&forwards), &names, &ramdisk, |_| "bridge=nat")?;
    let network = Some(Network { forwards });
    let mut machine = Machine::boot(title, &Setup { memory: MACHINE, limit: LIMIT, network, ..Setup::new(bundle) })?;
    addresses(&mut machine, &names)?;
    for name in &names {
        console(&mut machine, name)?;
        shell(&mut machine, "ping -q -c 1 -W 10 10.77.0.1 && ping -q -c 1 -W 10 10.0.2.2")?;
        shell(&mut machine, "mkdir www && hostname > www/name && httpd -h www")?;
    }
    for (name, port) in names.iter().zip(&ports) {
        let until = Instant::now() + BOOT;
        let answer = loop {
            match get(*port, "name") {
                Ok(answer) if !answer.is_empty() => break answer,
                other => ensure!(Instant::now() < until, "the port of {name} leads nowhere: {other:?}"),
            }
            thread::sleep(Duration::from_millis(200));
        };
        ensure!(answer.starts_with("HTTP/1.0 200 ") || answer.starts_with("HTTP/1.1 200 "), "{name}: {answer}");
        ensure!(answer.ends_with(&format!("\r\n\r\n{name}\n")), "the port of {name} leads elsewhere: {answer}");
    }
    for name in &names {
        machine.require_answer(&format!("destroy {name}"), &done("destroy", name))?;
    }
    machine.finish()?.require_success()
}
