//! Stories of networks with many guests, for `cargo xtask soak`.

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
/// Pings of a measurement while others leave the CPU alone, and while others use what they get of the CPU.
const TRIPS: [u32; 2] = [1_000, 50];
/// How many times as long as when nobody does anything a round trip may take while a vif limits a flood.
const TIMES: f64 = 2.0;
/// How long a round trip may take while a flood has no limit, in milliseconds. The sender and the receiver of the flood use all
/// of the CPU that they get. A trip wakes dom0 twice, which waits for one slice of the CPU, and a guest twice, which waits for
/// two. A slice is a millisecond while dom0 has something to do, and ten otherwise.
const SLICES_MS: f64 = 6.0;
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

/// The average time of so many round trips from a guest to an address, in milliseconds of the guest's clock. No packet may be
/// lost.
fn trip(machine: &mut Machine, from: &str, to: Ipv4Addr, count: u32) -> Result<f64> {
    console(machine, from)?;
    let said = value(machine, &format!("ping -q -A -c {count} -W 10 {to}"), PINGED)?;
    ensure!(said.contains(&format!(" {count} packets received")), "{from} pings {to}: {said}");
    let times = said.split_once("min/avg/max = ").with_context(|| format!("no times: {said}"))?.1;
    Ok(times.split('/').nth(1).with_context(|| format!("no average: {said}"))?.parse()?)
}

/// The times of so many round trips of each of these pairs.
fn trips(machine: &mut Machine, what: &str, pairs: &[(&String, Ipv4Addr)], count: u32) -> Result<Vec<f64>> {
    let times: Vec<f64> = pairs.iter().map(|(from, to)| trip(machine, from, *to, count)).collect::<Result<_>>()?;
    println!("round trips {what}: {times:?} ms");
    Ok(times)
}

/// The number of packets that a guest's device has received.
fn received(machine: &mut Machine, name: &str) -> Result<u64> {
    vif(&machine.ask("network-list")?, name, 0)?["received"].as_u64().context("no count of packets")
}

/// Sixteen guests of one network have addresses by DHCP, and each reaches each. While one floods another and its vif limits the
/// flood, a round trip between others takes at most twice as long as while nobody does anything. While a flood has no limit,
/// and while it goes to all others, guests share the CPU with it as with guests that compute, and a round trip takes no longer
/// than the slices of the CPU explain, and less than beside guests that compute.
pub(crate) fn a_flood_leaves_others_their_round_trips(title: &str) -> Result<()> {
    let (names, ramdisk) = (names(16), ramdisk()?);
    let [.., limited, flooder, target] = &*names else { bail!("too few guests: {names:?}") };
    let vif = |name: &str| if name == limited { "bridge=lan,rate=1Mb/s" } else { "bridge=lan" };
    let bundle = crowd(dom0("")?, &names, &ramdisk, vif)?;
    // By the clock of the machine, which counts instructions, times do not depend on this machine.
    let setup = Setup { memory: MACHINE, limit: LIMIT, counted: true, ..Setup::new(bundle) };
    let mut machine = Machine::boot(title, &setup)?;
    let found = addresses(&mut machine, &names)?;
    let all = found.iter().map(Ipv4Addr::to_string).collect::<Vec<_>>().join(" ");
    for name in &names {
        console(&mut machine, name)?;
        let pings = format!("for a in {all}; do ping -q -c 1 -W 10 $a > said || cat said; done; echo .");
        let said = value(&mut machine, &pings, PINGED)?;
        ensure!(said == ".", "{name} does not reach all others: {said}");
    }
    let pairs = [(&names[0], found[1]), (&names[4], found[5]), (&names[8], found[9])];
    let [many, few] = TRIPS;
    let idle = trips(&mut machine, "while nobody does anything", &pairs, many)?;
    for name in [flooder, target] {
        run(&mut machine, name, "while :; do :; done")?;
    }
    let computing = trips(&mut machine, "while two guests compute", &pairs, few)?;
    for name in [flooder, target] {
        quiet(&mut machine, name)?;
    }
    let (another, broadcast) = (found[15], Ipv4Addr::new(10, 77, 1, 255));
    let floods = [
        ("while a guest floods another at 1 Mb/s", limited, another, many),
        ("while a guest floods another", flooder, another, few),
        ("while a guest floods all others", flooder, broadcast, few),
    ];
    let mut missed = Vec::new();
    for (what, from, to, count) in floods {
        let before = received(&mut machine, target)?;
        run(&mut machine, from, &format!("microbench flood {to}"))?;
        let flooded = trips(&mut machine, what, &pairs, count)?;
        let packets = received(&mut machine, target)? - before;
        println!("{target} has received {packets} packets meanwhile");
        ensure!(packets > FLOOD, "{packets} packets are no flood");
        quiet(&mut machine, from)?;
        for (took, (idle, computing)) in flooded.iter().zip(idle.iter().zip(&computing)) {
            let most = if from == limited { TIMES * idle } else { SLICES_MS.min(*computing) };
            missed.extend((*took > most).then(|| format!("a round trip {what}: {took} ms, at most {most} ms")));
        }
    }
    ensure!(missed.is_empty(), "{}", missed.join("; "));
    for name in &names {
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
